"""The momentum teacher: equal at the start, moved as by hand, frozen."""

import copy
import math

import pytest
import torch
from torch import nn

from mamo.config.objective import TeacherConfig
from mamo.models.heads import MLMHead
from mamo.teacher import Teacher, momentum_at


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_starts_equal_but_shares_no_memory() -> None:
    """Bug: a teacher with its own random weights, or one that *is* the student and so moves with every step."""
    network = student()
    teacher = Teacher(network)
    before = copy.deepcopy(network.state_dict())
    for name, tensor in before.items():
        assert torch.equal(tensor, teacher.module.state_dict()[name]), name
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.add_(1)
    for name, tensor in before.items():
        assert torch.equal(tensor, teacher.module.state_dict()[name]), name


def test_moves_as_computed_by_hand() -> None:
    """Bug: momentum and its complement exchanged, a parameter left out, or buffers averaged or forgotten."""
    network = student()
    teacher = Teacher(network)
    for momentum in (0.9, 0.25):
        mine = [p.clone() for p in teacher.module.parameters()]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        network(torch.randn(8, 3))  # moves the running statistics
        teacher.update(network, momentum)
        for old, new, theirs in zip(mine, teacher.module.parameters(), network.parameters()):
            torch.testing.assert_close(new, momentum * old + (1 - momentum) * theirs.detach())
        for my_buffer, their_buffer in zip(teacher.module.buffers(), network.buffers()):
            assert torch.equal(my_buffer, their_buffer)


def test_a_head_that_shares_a_weight_moves_once() -> None:
    """Bug: the copy of a tied weight is torn from its original, or averaged twice in one step."""
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    head = MLMHead(4, network[0])
    teacher = Teacher(network, head)
    assert teacher.mlm is not None
    assert teacher.mlm.decoder.weight is teacher.module[0].weight
    old = [p.clone() for p in teacher.parameters()]
    assert len(old) == 3 + 5
    with torch.no_grad():
        for parameter in (*network.parameters(), *head.bert_named_tensors().values()):
            parameter.add_(1)
    teacher.update(network, 0.75, head)
    for before, after in zip(old, teacher.parameters()):
        torch.testing.assert_close(after, before + 0.25)
    with pytest.raises(AssertionError):
        teacher.update(network, 0.75)
    teacher.copy_head(head)
    torch.testing.assert_close(teacher.mlm.dense.weight, head.dense.weight)
    torch.testing.assert_close(teacher.module[0].weight, old[0] + 0.25)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_at_the_ends(momentum: float) -> None:
    """Bug: momentum 0 does not copy the student, or momentum 1 still drifts by rounding."""
    network = student()
    teacher = Teacher(network)
    old = [p.clone() for p in teacher.module.parameters()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.7).add_(0.3)
    teacher.update(network, momentum)
    expected = old if momentum == 1 else [p.detach() for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(teacher.module.parameters(), expected))


def test_gets_no_gradient_and_update_leaves_the_student_alone() -> None:
    """Bug: the optimizer or autograd reaches the teacher; the update changes the student or its gradient."""
    network = student()
    teacher = Teacher(network)
    assert not any(p.requires_grad for p in teacher.parameters())
    inputs = torch.randn(4, 3)
    (network(inputs) - teacher.module(inputs)).square().sum().backward()
    state, gradients = copy.deepcopy(network.state_dict()), [p.grad.clone() for p in network.parameters()]
    teacher.update(network, 0.9)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(network.parameters(), gradients))
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_stays_in_eval() -> None:
    """Bug: `.train()` on a parent switches dropout on in the targets."""
    parent = nn.ModuleList([student(), Teacher(student())])
    parent.train()
    assert parent[0].training
    assert not any(module.training for module in parent[1].modules())


def test_momentum_schedules() -> None:
    """Bug: a cosine that starts at 1, ends at the start value, or is used where `constant` was asked for."""
    cosine, constant = TeacherConfig(momentum=0.9, schedule="cosine"), TeacherConfig(momentum=0.9)
    values = [momentum_at(cosine, step, 100) for step in range(101)]
    assert values[0] == pytest.approx(0.9)
    assert values[50] == pytest.approx(0.95)
    assert values[25] == pytest.approx(1 - 0.1 * (1 + math.sqrt(0.5)) / 2)
    assert values[100] == pytest.approx(1.0)
    assert values == sorted(values)
    assert {momentum_at(constant, step, 100) for step in range(100)} == {0.9}
