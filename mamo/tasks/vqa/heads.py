"""The answer heads of VQA on the fused tokens of image and question: a decoder of words, and a classifier.

Legend: B questions, K answers a question, T answer tokens, S fused tokens, A heads, D fusion width, V vocabulary,
N answers of the list.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.models.attention import attend
from mamo.models.fusion import LAYER_NORM_EPS, FusionEncoder, FusionLayer
from mamo.models.heads import MLMHead, fp32_linear
from mamo.models.init import init_like_bert
from mamo.models.layers import LayeredModule
from mamo.models.towers import TextTower


class DecoderLayer(nn.Module):
    """A post-norm decoder layer (Vaswani et al. 2017), as BERT's with `add_cross_attention`.

    ``x = LN(x + CausalAttention(x)); x = LN(x + Attention(x, memory)); x = LN(x + MLP(x))``. `cross` holds the latter
    two: a fusion layer whose queries come from the answers and whose keys and values come from the memory.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout_p = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_like_bert)
        self.cross = FusionLayer(width, heads, mlp_width, dropout)

    def forward(self, tokens: Tensor, memory: Tensor, memory_is_valid: Tensor) -> Tensor:
        """Transform answers float [B, K, T, D] with their question's memory [B, S, D], valid where bool [B, S].

        A token attends to itself and the tokens before it, so padding at an answer's end changes nothing before it.
        """
        b, k, t, d = tokens.shape
        query, key, value = self.qkv(tokens).view(b * k, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B K, A, T, .]
        is_before = torch.ones(t, t, dtype=torch.bool, device=tokens.device).tril()
        dropout_p = self.dropout_p if self.training else 0.0
        attn_output = attend(query, key, value, is_before, dropout_p).transpose(1, 2).reshape(tokens.shape)
        tokens = self.norm(tokens + self.dropout(self.out(attn_output))).view(b, k * t, d)
        query, key, value = self.cross.project(memory, tokens)  # each memory is projected once for its K answers
        attn_output = attend(query, key, value, memory_is_valid[:, None, None, :], dropout_p)
        return self.cross.output_and_mlp(tokens, attn_output).view(b, k, t, d)

    def init_from(self, layer: FusionLayer) -> None:
        """Copy a fusion layer into both attentions and the MLP: it attends to words and to patches."""
        self.cross.load_state_dict(layer.state_dict())
        for mine, theirs in ((self.qkv, layer.qkv), (self.out, layer.out), (self.norm, layer.norm1)):
            mine.load_state_dict(theirs.state_dict())


class AnswerDecoder(LayeredModule):
    """Generates an answer token by token (as ALBEF does), with as many decoder layers as there are fusion layers.

    Words and positions are embedded by the text encoder.
    """

    layers: nn.ModuleList

    def __init__(self, fusion: FusionEncoder, text_encoder: TextTower) -> None:
        super().__init__()
        width, mlp_width, dropout = fusion.width, fusion.mlp_width, fusion.dropout_p
        same = text_encoder.width == width
        self.project = nn.Identity() if same else nn.Linear(text_encoder.width, width)
        self.project.apply(init_like_bert)
        self.layers = nn.ModuleList([DecoderLayer(width, fusion.heads, mlp_width, dropout) for _ in fusion.layers])
        self.words = MLMHead(width, text_encoder.word_embeddings)

    def forward(self, embedded: Tensor, memory: Tensor, memory_is_valid: Tensor) -> Tensor:
        """Compute vocabulary logits of each next token.

        Args:
            embedded: float [B, K, T, D_text], the answers' tokens so far, from the text encoder's embedding.
            memory: float [B, S, D], fused image and question.
            memory_is_valid: bool [B, S], False for padding.

        Returns:
            float [B, K, T, V], in fp32 or finer.
        """
        tokens = self.project(embedded)
        for layer in self.layers:
            tokens = layer(tokens, memory, memory_is_valid)
        return fp32_linear(self.words.decoder, self.words.transform(tokens))

    def init_from(self, fusion: FusionEncoder) -> None:
        """Copy the fusion's layers, which are trained on words and patches.

        Raises:
            ValueError: the fusion's layers are of another kind than `FusionLayer`.
        """
        for mine, theirs in zip(self.layers, fusion.layers, strict=True):
            assert isinstance(mine, DecoderLayer)
            if not isinstance(theirs, FusionLayer):
                raise ValueError(f"an answer decoder starts from FusionLayer layers, not {type(theirs).__name__}")
            mine.init_from(theirs)


class AnswerClassifier(nn.Module):
    """Classifier over a list of N answers (as METER's and ViLT's): Linear, LayerNorm, GELU, Linear on fused [CLS].

    `start_from` sets its biases, so that no step is spent on how rare answers are.
    """

    def __init__(self, width: int, n_answers: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, eps=LAYER_NORM_EPS)
        self.classifier = nn.Linear(2 * width, n_answers)
        self.apply(init_like_bert)

    def start_from(self, log_odds: Tensor) -> None:
        """Set the biases to the answers' log-odds in the training data, float32 [N]."""
        with torch.no_grad():
            self.classifier.bias.copy_(log_odds)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute a logit of each answer, [B, N] in fp32 or finer, from the fused text [CLS], float [B, D]."""
        return fp32_linear(self.classifier, functional.gelu(self.norm(self.dense(hidden))))


def answer_likelihood(logits: Tensor, ids: Tensor, is_valid: Tensor) -> Tensor:
    """Compute the log-likelihood of answers, the sum over their tokens after [CLS], [SEP] included.

    Args:
        logits: float [..., T - 1, V], of the token after each of the first T - 1.
        ids: int64 [..., T], `[CLS] answer [SEP]`.
        is_valid: bool [..., T], False at padding.

    Returns:
        float32 [...].
    """
    chosen = logits.float().log_softmax(dim=-1).gather(-1, ids[..., 1:, None])[..., 0]
    return torch.where(is_valid[..., 1:], chosen, 0.0).sum(dim=-1)
