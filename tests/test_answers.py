import pytest
import torch
from torch import nn

from deploykit.train.answers import KeptAnswers


class Counting(nn.Module):
    """Counts how often it is asked."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.asked = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)),
            0,
        )

    def forward(self, inputs):
        self.asked += 1
        return self.layer(inputs)


@pytest.fixture
def batch():
    return torch.randn(7, 3, 6, 6).contiguous(memory_format=torch.channels_last)


def test_no_answer_is_computed_twice_even_by_another_process(tmp_path, batch):
    teacher = Counting()
    wanted = teacher(batch)
    for _ in range(2):
        answers = KeptAnswers(teacher, tmp_path / "deep/answers.sqlite")
        assert torch.equal(answers(batch), wanted)
        assert torch.equal(answers(batch.contiguous()), wanted)
    assert teacher.asked == 2  # once for this test itself


def test_other_batches_and_other_teachers_are_not_mixed_up(tmp_path, batch):
    path, teacher, other = tmp_path / "answers.sqlite", Counting(), Counting(seed=1)
    KeptAnswers(teacher, path)(batch)
    assert torch.equal(KeptAnswers(other, path)(batch), other(batch))
    assert torch.equal(KeptAnswers(teacher, path)(batch[:3]), teacher(batch[:3]))
    assert torch.equal(KeptAnswers(teacher, path)(batch + 1), teacher(batch + 1))
    assert not torch.equal(KeptAnswers(other, path)(batch), KeptAnswers(teacher, path)(batch))


def test_a_damaged_file_is_begun_anew(tmp_path, batch):
    path, teacher = tmp_path / "answers.sqlite", Counting()
    path.write_bytes(b"no database" * 1000)
    assert torch.equal(KeptAnswers(teacher, path)(batch), teacher(batch))


def test_a_large_file_grows_no_further(tmp_path, batch, monkeypatch):
    monkeypatch.setattr("deploykit.train.answers.MOST_BYTES", 1)
    teacher = Counting()
    answers = KeptAnswers(teacher, tmp_path / "answers.sqlite")
    answers(batch)
    answers(batch)
    assert teacher.asked == 2
