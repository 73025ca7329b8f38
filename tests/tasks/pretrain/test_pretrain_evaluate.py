"""The whole zero-shot evaluation: a tiny network against naive loops, and planted networks that know or do not."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mamo.config.schema import EvaluationConfig
from mamo.evaluation.metrics.statements import read_scores
from mamo.evaluation.scorer import EncodedImages, Scorer
from mamo.explain import image_grad_cam, occlusion
from mamo.models.cross_fusion import CrossFusion
from mamo.tasks.pretrain.evaluate import _gallery, _retrieval_in_folds, evaluate_pretrained
from mamo.tasks.registry import build_config
from mamo.tasks.sources import load_tokenizer
from mamo.world.captions import identifying_caption
from mamo.world.masked_words import masked_word_items
from mamo.world.probes import PROBES, probe_items
from mamo.world.referring import expressions
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, SceneWorld, near_duplicate
from tests.tiny import make_backbone, make_network, predictor_of, spread_weights

CPU = torch.device("cpu")
TOKENIZER = load_tokenizer("scenes")
RETRIEVAL = {f"{d}_r{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)} | {"rsum"}


def config_of(data=None, **evaluation):
    sizes = {"retrieval_items": 14, "probe_items": 12, "rerank_k": 14, "batch_size": 5}
    data = {"image_size_px": 16, **(data or {})}
    if data.get("source") == "pairs":
        data["train_file"] = "unused.jsonl"
    return build_config({"output_dir": "unused", "data": data, "evaluation": {**sizes, **evaluation}})


def tiny_network(*names):
    network = make_network(make_backbone(dropout=0.5), *(names or ("itc", "itm", "mlm")))
    spread_weights(network)
    return network


def scenes_of(config, n):
    world = SceneWorld(config.data.difficulty, WORLD_SEED)
    scenes = [world.scene("test", k) for k in range(n)]
    pictures = [torch.from_numpy(render(scene, config.data.image_size)).permute(2, 0, 1) for scene in scenes]
    return pictures, [identifying_caption(scene).text for scene in scenes]


@torch.no_grad()
def naive_match(network, picture, text):
    """One pair, without padding, batches or stored tokens."""
    backbone = network.backbone
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    is_valid = torch.ones_like(ids, dtype=torch.bool)
    image = backbone.fusion.embed_image(backbone.image_encoder(picture[None]))
    fused = backbone.fusion(image, backbone.text_encoder(ids, is_valid), is_valid)
    logits = network.itm(fused[:, int(backbone.fusion.text_positions(torch.tensor(0)))])[0]
    return float(logits[1] - logits[0])


def test_reranking_the_whole_gallery_equals_scoring_all_pairs():
    """Would catch wrong rows, padding that is attended to, lost order after sorting by length, and stale ITC ranks."""
    network, config = tiny_network(), config_of()
    metrics = evaluate_pretrained(predictor_of(network), config)
    network.eval()
    pictures, captions = scenes_of(config, 14)
    score = np.array([[naive_match(network, picture, text) for text in captions] for picture in pictures])
    assert len(set(captions)) == 14
    for direction, table in (("i2t", score), ("t2i", score.T)):
        rank = np.array([(row > row[k]).sum() for k, row in enumerate(table)])
        for depth in (1, 5, 10):
            assert metrics[f"rerank/{direction}_r{depth}"] == pytest.approx(100 * (rank < depth).mean())
    assert 0 < metrics["rerank/i2t_r5"] < 100


def cross_network():
    network = tiny_network()
    network.backbone.fusion = CrossFusion(16, 2, 2, 32, image_width=16, grid=(2, 2), num_prefix_tokens=1, dropout=0.5)
    spread_weights(network.backbone.fusion)
    return network


def test_each_image_is_embedded_once_for_all_its_pairs():
    """Would catch keys and values projected once a pair, or once a batch, in re-ranking."""
    network, config = cross_network().eval(), config_of()
    pictures, captions = scenes_of(config, 6)
    embedded = []
    original = network.backbone.fusion.embed_image
    network.backbone.fusion.embed_image = lambda tokens, *rest: embedded.append(len(tokens)) or original(tokens, *rest)
    with torch.inference_mode():
        scorer = Scorer(predictor_of(network), batch_size=4)
        images = scorer.encode_images([torch.stack(pictures)])
        texts = scorer.encode_texts(*scorer.tokenize(captions))
        table = torch.cartesian_prod(torch.tensor([0, 1, 3, 4, 5]), torch.arange(6))
        scorer.itm_scores(images, texts, *table[torch.randperm(len(table))].T)
        assert sum(embedded) == 5
        assert max(embedded) <= 4
        assert scorer.itm_scores(images, texts, *table[:0].T).shape == (0,)


@pytest.mark.parametrize("make_network", [tiny_network, cross_network])
def test_pair_scores_equal_unbatched_ones(make_network):
    """Would catch a score written to another pair's place, and masks or lengths of another text."""
    network, config = make_network().eval(), config_of()
    pictures, captions = scenes_of(config, 6)
    captions = [*captions, "a red circle", "two shapes"]
    with torch.inference_mode():
        scorer = Scorer(predictor_of(network), batch_size=3)
        images = scorer.encode_images([torch.stack(pictures[:4]), torch.stack(pictures[4:])])
        texts = scorer.encode_texts(*scorer.tokenize(captions))
        rows = torch.tensor([(k * 5 % 6, k * 3 % 8) for k in range(20)])
        score = scorer.itm_scores(images, texts, rows[:, 0], rows[:, 1])
        similarity = scorer.similarity(images, texts, rows[:, 0], rows[:, 1])
        for (i, t), matched, similar in zip(rows.tolist(), score, similarity):
            assert float(matched) == pytest.approx(naive_match(network, pictures[i], captions[t]), abs=1e-4)
            ids = torch.tensor([TOKENIZER(captions[t])["input_ids"]])
            image = network.backbone.image_feature(network.backbone.image_encoder(pictures[i][None]))
            text = network.backbone.text_feature(network.backbone.text_encoder(ids, ids > 0))
            assert float(similar) == pytest.approx(float(image[0] @ text[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (("itc",), {"itc", "probe/itc"}),
        (("itm",), {"probe/itm", "grounding"}),
        (("mlm",), {"masked_word"}),
        (("itc", "itm", "mlm"), {"itc", "rerank", "probe/itc", "probe/itm", "masked_word", "grounding"}),
    ],
)
def test_absent_heads_leave_their_metrics_out_and_modes_return(heads, expected):
    """Would catch a crash or a made-up number without a head, and a network left in evaluation mode."""
    network = tiny_network(*heads).train()
    network.backbone.text_encoder.eval()
    before = [module.training for module in network.modules()]
    metrics = evaluate_pretrained(predictor_of(network), config_of())
    assert [module.training for module in network.modules()] == before
    wanted = {f"{name}/{metric}" for name in expected & {"itc", "rerank"} for metric in RETRIEVAL}
    wanted |= {f"probe/{probe}/{by}" for probe in PROBES for by in ("itc", "itm") if f"probe/{by}" in expected}
    if "grounding" in expected:
        wanted |= {f"grounding/{name}" for name in ("proposal", "pointing", "random_proposal", "upper_bound")}
    if "masked_word" in expected:
        wanted |= {f"masked_word/{name}" for name in ("colour", "shape", "size", "relation", "number")}
    assert set(metrics) == wanted
    assert all(0 <= value <= 100 for name, value in metrics.items() if "rsum" not in name)


def test_patches_are_read_out_where_scenes_for_them_are_asked_for():
    """Would catch a setting that is not read, and facts that leave the number of scenes out."""
    network = tiny_network("itc")
    metrics = evaluate_pretrained(predictor_of(network), config_of(patch_scenes=24))
    found = {name for name in metrics if name.startswith("patches/")}
    assert {name.rpartition("/")[2] for name in found} == {"encoder", "no_caption", "true_caption"}
    assert len(found) == 18
    assert metrics.facts["patch_scenes"] == 24


def test_repeats_and_bf16_agree():
    """Would catch dropout that stays on, and stored tokens in another precision than the weights."""
    network, config = tiny_network().train(), config_of()
    first = evaluate_pretrained(predictor_of(network), config)
    assert evaluate_pretrained(predictor_of(network), config) == first
    coarse = evaluate_pretrained(predictor_of(network.bfloat16()), config)
    assert coarse.keys() == first.keys()
    assert abs(coarse["rerank/rsum"] - first["rerank/rsum"]) < 100


class Planted(nn.Module):
    """A network with planted knowledge: `truths` by picture and sentence, `words` by picture and masked sentence."""

    def __init__(self, truths, words):
        super().__init__()
        self.truths, self.words = truths, words
        self.pictures, self.texts = {}, {}
        self.backbone = PlantedBackbone(self)
        self.temperature = 1.0

    def get_head(self, name):
        return getattr(self, name)

    def itm(self, fused):
        logits = torch.zeros(len(fused), 2)
        for n, (picture, text, _) in enumerate(fused.int().tolist()):
            logits[n, 1] = float(text in self.truths.get(picture, ()))
        return logits

    def mlm(self, fused):
        logits = torch.zeros(len(fused), len(TOKENIZER))
        for n, (picture, text, place) in enumerate(fused.int().tolist()):
            logits[n, self.words.get((picture, text, place), 0)] = 1
        return logits


class PlantedBackbone:
    """Tokens [number of the picture or text, 0, position]: fusion joins the two numbers."""

    n_features = 600
    width = mlp_width = 3
    num_image_positions = 1

    def __init__(self, owner):
        self.owner = owner
        self.fusion = self.text_encoder = self

    def image_encoder(self, image):
        numbers = [self.owner.pictures.get(picture.numpy().tobytes(), -1) for picture in image]
        return torch.tensor(numbers).float()[:, None, None].expand(-1, 1, 3)

    def __call__(self, *tokens):
        return self.encode_text(*tokens)

    def encode_text(self, input_ids, is_valid):
        numbers = [text_number(ids[valid].tolist()) for ids, valid in zip(input_ids, is_valid)]
        places = torch.arange(input_ids.shape[1]).float()
        tokens = torch.tensor(numbers).float()[:, None, None].repeat(1, input_ids.shape[1], 3)
        tokens[:, :, 2] = places
        return tokens

    def image_feature(self, tokens):
        features = torch.zeros(len(tokens), self.n_features)
        for n, picture in enumerate(tokens[:, 0, 0].int().tolist()):
            features[n, list(self.owner.truths.get(picture, ()))] = 1
        return features

    def text_feature(self, tokens):
        return nn.functional.one_hot(tokens[:, 0, 0].long(), self.n_features).float()

    def embed_image(self, tokens, visible=None):
        return tokens

    def embed_text(self, tokens, is_valid):
        return tokens

    def text_positions(self, positions):
        return positions + 1

    def share_image(self, image):
        return image

    def fuse_pairs(self, image, text, is_valid, output_positions, image_indices, text_indices):
        text, is_valid = text[text_indices], is_valid[text_indices]
        assert is_valid.gather(1, output_positions - 1).all()
        fused = text.gather(1, (output_positions - 1)[..., None].expand(-1, -1, 3)).clone()
        fused[:, :, 1] = fused[:, :, 0]
        fused[:, :, 0] = image[image_indices, :1, 0]
        return fused


NUMBERS = {}


def text_number(ids):
    """A number for each distinct row of token ids."""
    return NUMBERS.setdefault(tuple(ids), len(NUMBERS))


def planted_scenes(config, is_knowing):
    """A planted network for the test scenes of `config`; one that does not know finds nothing true."""
    world = SceneWorld(config.data.difficulty, WORLD_SEED)
    network = Planted({}, {})
    NUMBERS.clear()

    def picture_number(index):
        picture = torch.from_numpy(render(world.scene("test", index), config.data.image_size)).permute(2, 0, 1)
        return network.pictures.setdefault(picture.contiguous().numpy().tobytes(), len(network.pictures))

    facts = [(k, identifying_caption(world.scene("test", k)).text) for k in range(config.evaluation.retrieval_items)]
    for probe in PROBES:
        items = probe_items(world, probe, config.evaluation.probe_items)
        facts += [(item.scene_index, item.caption) for item in items]
    for index, caption in facts if is_knowing else ():
        network.truths.setdefault(picture_number(index), set()).add(text_number(TOKENIZER(caption)["input_ids"]))
    for item in masked_word_items(world, config.evaluation.probe_items) if is_knowing else ():
        ids = TOKENIZER(item.caption[: item.start] + "@" + item.caption[item.end :])["input_ids"]
        place = ids.index(TOKENIZER.convert_tokens_to_ids("@"))
        ids[place] = TOKENIZER.mask_token_id
        answer = TOKENIZER.convert_tokens_to_ids(item.answers[-1])
        network.words[picture_number(item.scene_index), text_number(ids), place] = answer
    return network


def test_half_of_the_gallery_are_near_duplicates():
    """Would catch a switch that changes the protocol's name and nothing else."""
    world = SceneWorld("easy", WORLD_SEED)
    plain, near = (_gallery(world, config_of(near_duplicates=is_near)) for is_near in (False, True))
    n = len(plain)
    assert [scene.index for scene in plain] == list(range(n))
    assert near[: n // 2] == plain[: n // 2]
    assert near[n // 2 :] == [near_duplicate(scene) for scene in plain[: n // 2]]


@pytest.fixture
def no_grounding(monkeypatch):
    """A planted network has no attention to explain."""
    monkeypatch.setattr("mamo.tasks.pretrain.evaluate._grounding", lambda *arguments: {})


@pytest.mark.parametrize("heat_from", ["fusion", "image_encoder", "occlusion"])
def test_a_heat_on_the_object_grounds_it(monkeypatch, heat_from):
    """Would catch expressions joined with the heat of another picture, boxes in other units than the heat, and the
    heat of fusion where the config asks for another."""
    config = config_of(rerank_k=3, grounding_heat=heat_from)
    world = SceneWorld("easy", WORLD_SEED)
    items = list(expressions(world, config.evaluation.probe_items, config.data.image_size))
    height, width = config.data.image_size
    read = []

    def oracle(self, images, texts, image_indices, text_rows):
        heat = torch.zeros(len(text_rows), height, width)
        for k in range(len(text_rows)):
            x, y, w, h = items[text_rows[k]].box
            heat[k, math.ceil(y) : int(y + h), math.ceil(x) : int(x + w)] = 1
        return heat

    def pixel_oracle(self, how, images, texts, image_indices, text_rows):
        read.append(how)
        for image_row, text_row in zip(image_indices, text_rows):
            scene = world.scene("test", items[text_row].scene_index)
            assert torch.equal(images[image_row].permute(1, 2, 0), torch.from_numpy(render(scene, (height, width))))
        return oracle(self, images, texts, image_indices, text_rows)

    monkeypatch.setattr(Scorer, "gradcam", oracle)
    monkeypatch.setattr(Scorer, "pixel_heatmaps", pixel_oracle)
    network = tiny_network().eval()
    metrics = evaluate_pretrained(predictor_of(network), config)
    assert metrics["grounding/pointing"] == metrics["grounding/upper_bound"] == 100
    assert metrics["grounding/proposal"] > 80  # objects of 3 px: whole pixels are coarse
    assert 10 < metrics["grounding/random_proposal"] < 60
    assert set(read) == {"fusion": set(), "image_encoder": {image_grad_cam}, "occlusion": {occlusion}}[heat_from]


@pytest.mark.usefixtures("no_grounding")
def test_an_oracle_reaches_100_everywhere():
    """Would catch any item, row, caption, foil, slot or answer that does not belong to its picture."""
    config = config_of(rerank_k=3)
    metrics = evaluate_pretrained(predictor_of(planted_scenes(config, True)), config)
    rsums = {"itc/rsum": 600, "rerank/rsum": 600}
    assert metrics == {name: rsums.get(name, 100) for name in metrics}
    assert len(metrics) == 2 * 7 + 2 * 5 + 5


@pytest.mark.usefixtures("no_grounding")
def test_a_constant_network_is_at_chance():
    """Would catch any metric that rewards a network which says the same of everything: chance at K is K of 14."""
    config = config_of(rerank_k=3)
    metrics = evaluate_pretrained(predictor_of(planted_scenes(config, False)), config)
    for name, value in metrics.items():
        depth = re.search(r"_r(\d+)$", name)
        chance = 100 * int(depth[1]) / 14 if depth else 2 * 1600 / 14 if "rsum" in name else 0
        assert value == 50 if name.startswith("probe") else value <= chance, name
    assert metrics["itc/rsum"] == 0


def write_pairs(folder, n_images=9):
    """Images of one grey level each; captions shared between images, several an image, one image on two rows."""
    rows, statements = [], []
    for k in range(n_images):
        Image.fromarray(np.full((16, 16, 3), 20 * k + 5, np.uint8)).save(folder / f"{k}.png")
        several = [f"one shape {k}", f"{('two', 'Two')[k % 2]} shapes {k // 3}"]
        rows.append({"image": f"{k}.png", "caption": several, "image_id": k})
        for label in (True, False):
            text = f"three shapes {k}" if label else f"three shapes {(k + 1) % n_images}"
            statements.append({"image": f"{k}.png", "sentence": text, "label": label, "directory": str(k % 6)})
    rows.append({"image": "0.png", "caption": "One shape 0", "image_id": 0})
    rows.append({"image": "0.png", "caption": "four shapes", "image_id": 0})
    for name, lines in (("pairs", rows), ("statements", statements)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {name: str(folder / f"{name}.jsonl") for name in ("pairs", "statements")}
    return {"source": "pairs", "eval_file": files["pairs"], "statements_file": files["statements"]}


def planted_pairs(n_images=9):
    network = Planted({}, {})
    NUMBERS.clear()
    for k in range(n_images):
        network.pictures[torch.full((3, 16, 16), 20 * k + 5, dtype=torch.uint8).numpy().tobytes()] = k
        texts = [f"one shape {k}", f"two shapes {k // 3}", f"three shapes {k}"] + ["four shapes"] * (k == 0)
        network.truths[k] = {text_number(TOKENIZER(text)["input_ids"]) for text in texts}
    return network


def test_pairs_with_shared_captions_and_statements(tmp_path):
    """Would catch a shared caption counted as a wrong answer, rows not joined by image id, and exchanged labels."""
    config = config_of(write_pairs(tmp_path), rerank_k=4)
    metrics = evaluate_pretrained(predictor_of(planted_pairs()), config, tmp_path / "scores.jsonl")
    assert {name: metrics[name] for name in ("itc/rsum", "rerank/rsum")} == {"itc/rsum": 600, "rerank/rsum": 600}
    assert metrics["statements/accuracy"] == metrics["statements/interval_low"] == 100
    assert metrics["statements/majority"] == 50
    assert len(metrics) == 2 * 7 + 4
    score, records = read_scores(tmp_path / "scores.jsonl")
    assert [value > 0 for value in score] == [record.label for record in records] == [True, False] * 9


def test_pairs_with_a_bad_image(tmp_path):
    """Would catch rows that shift behind a skipped image, and a broken image that passes in silence."""
    data = write_pairs(tmp_path)
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"4\.png"):
        evaluate_pretrained(predictor_of(planted_pairs()), config_of(data))
    data["bad_samples"] = {"policy": "skip", "budget": 0.5}
    metrics = evaluate_pretrained(predictor_of(planted_pairs()), config_of(data))
    assert metrics["itc/rsum"] == metrics["rerank/rsum"] == 600
    assert metrics["statements/accuracy"] == 100


def test_galleries_in_folds(monkeypatch):
    """Would catch COCO 1K measured on the whole gallery, on its first fold alone, or with captions of other images."""
    seen = []

    def retrieval(scorer, images, captions, k, first):
        seen.append((captions, k, first))
        return {"r1": float(images.feature[first : first + 2].sum())}

    monkeypatch.setattr("mamo.tasks.pretrain.evaluate._retrieval", retrieval)
    images = EncodedImages(torch.arange(6.0).view(6, 1, 1), torch.arange(6.0).view(6, 1))
    captions = [[f"caption {k}"] for k in range(6)]
    metrics = _retrieval_in_folds(None, images, captions, EvaluationConfig(retrieval_folds=3, rerank_k=7))
    assert metrics == {"r1": 5.0}
    assert seen == [(captions[k : k + 2], 7, k) for k in (0, 2, 4)]
    with pytest.raises(ValueError, match=r"retrieval_folds: 4 does not divide 6 images"):
        _retrieval_in_folds(None, images, captions, EvaluationConfig(retrieval_folds=4))


def test_repeated_captions_are_items_of_their_own(tmp_path):
    """Bug: recalls beside published ones from a gallery in which repeated captions are one item, right for several."""
    rng = np.random.default_rng(0)
    captions = [["a red circle", "two"], ["A red circle", "a blue square"], ["three", "three", "a green star"], ["..."]]
    for row in range(len(captions)):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"{row}.png")
    rows = [{"image": f"{row}.png", "caption": several} for row, several in enumerate(captions)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    network = tiny_network("itc", "itm")
    data = {"source": "pairs", "eval_file": str(tmp_path / "pairs.jsonl")}
    predictor = predictor_of(network)
    found = {
        kind: evaluate_pretrained(predictor, config_of(data, rerank_k=9, repeated_captions=kind))
        for kind in ("merged", "separate")
    }
    network.eval()
    owner = torch.tensor([row for row, several in enumerate(captions) for _ in several])
    texts = [text for several in captions for text in several]
    images = [predictor.processor.images([tmp_path / f"{row}.png"])[0] for row in range(len(captions))]
    score = torch.tensor([[naive_match(network, image, text) for text in texts] for image in images])
    is_right = owner == torch.arange(len(captions))[:, None]
    for direction, values, right in (("i2t", score, is_right), ("t2i", score.T, is_right.T)):
        best = values.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        rank = ((values >= best - 1e-5) & ~right).sum(dim=1)  # ties count against the query
        for depth in (1, 5, 10):
            expected = 100 * float((rank < depth).double().mean())
            assert found["separate"][f"rerank/{direction}_r{depth}"] == pytest.approx(expected)
    assert found["merged"] != found["separate"]
