import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tbptt_props as tb
from examples import __main__ as examples_main
from examples import character_model, lightning_docs
from examples.character_model import (
    CharacterModel,
    Passages,
    alphabet_of,
    encoded,
    help_texts,
    learn,
    measure,
    sample,
)

ROOT = Path(__file__).parent.parent


def fresh_model(alphabet: str, *, hidden: int, chunk: int) -> CharacterModel:
    """Make a float64 model of always the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CharacterModel(len(alphabet), hidden, len(alphabet), chunk=chunk).double()


class ForgetfulModel(CharacterModel):
    """Starts every chunk from no state, its loop otherwise the character model's."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for start in range(0, batch[0].shape[1], self.chunk):
            x, y = (tensor[:, start : start + self.chunk] for tensor in batch)
            loss = character_model.bits_per_character(self(x)[0], y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


def test_the_character_model_learns_more_of_real_text_than_how_often_each_letter_comes() -> None:
    text = help_texts()[:20_000]
    alphabet = alphabet_of(text)
    model = fresh_model(alphabet, hidden=32, chunk=10)
    passages = Passages(text, alphabet, batch=16, steps=40, batches=100, dtype=torch.float64)

    bits = learn(model, passages, every=20)

    shares = [text.count(character) / len(text) for character in alphabet]
    assert bits[0] == pytest.approx(math.log2(len(alphabet)), abs=0.5)
    assert sum(bits[-10:]) / 10 < -sum(share * math.log2(share) for share in shares) - 1


def test_progress_is_told_in_bits_per_character(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_texts()[:2_000]
    alphabet = alphabet_of(text)
    passages = Passages(text, alphabet, batch=2, steps=8, batches=4, dtype=torch.float64)

    bits = learn(fresh_model(alphabet, hidden=4, chunk=3), passages, every=2)

    told = [line for line in capsys.readouterr().out.splitlines() if "batches" in line]
    assert told == [
        f"after    2 batches: {sum(bits[:2]) / 2:.2f} bits per character",
        f"after    4 batches: {sum(bits[2:]) / 2:.2f} bits per character",
    ]


def test_the_character_models_command_tells_of_a_falling_loss_and_ends_in_a_sample(
    capsys: pytest.CaptureFixture[str],
) -> None:
    character_model.main(batches=50)

    told = capsys.readouterr().out
    blind, seen, unseen = (float(bits) for bits in re.findall(r"([\d.]+) bits per", told))
    assert blind > seen + 1
    assert blind > unseen + 1
    assert told.partition("It now writes:\n\n")[2].startswith("The ")


def test_the_logged_loss_weighs_every_time_step_alike() -> None:
    """At T = 7 and K = 3 the last chunk has one time step, so a mean over chunks would differ."""
    text = help_texts()[:2_000]
    alphabet = alphabet_of(text)
    passages = Passages(text, alphabet, batch=2, steps=7, batches=1, dtype=torch.float64)
    model = fresh_model(alphabet, hidden=4, chunk=3)
    model.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        model.parameters(), lr=0.0
    )

    (bits,) = learn(model, passages)

    assert bits == pytest.approx(measure(model, passages), rel=1e-12)


def test_the_text_is_the_help_that_comes_with_python() -> None:
    text = help_texts()

    assert "Assert statements are a convenient way to insert debugging assertions" in text
    assert len(text) > 400_000


def test_every_character_of_a_passage_is_followed_by_its_successor() -> None:
    text = help_texts()[:3_000]
    alphabet = alphabet_of(text)
    passages = Passages(text, alphabet, batch=4, steps=30, batches=2, dtype=torch.float64)

    batches = list(passages)

    assert len(batches) == len(passages) == 2
    for x, y in batches:
        assert x.shape == y.shape == (4, 30, len(alphabet))
        assert x.dtype == torch.float64
        for read, due in zip(x.argmax(-1), y.argmax(-1), strict=True):
            characters = "".join(alphabet[i] for i in [*read, due[-1]])
            assert characters in text
            assert torch.equal(read[1:], due[:-1])


def test_the_same_seed_gives_the_same_passages_and_another_gives_others() -> None:
    text = help_texts()[:3_000]
    alphabet = alphabet_of(text)

    first, again, other = (
        next(iter(Passages(text, alphabet, batch=4, steps=30, batches=1, seed=seed)))[0]
        for seed in (5, 5, 6)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_encoding_a_text_keeps_every_character() -> None:
    assert "".join("abc"[i] for i in encoded("cabba", "abc")) == "cabba"


def test_a_sample_goes_on_from_its_start_in_characters_of_the_alphabet() -> None:
    alphabet = alphabet_of(help_texts())
    model = fresh_model(alphabet, hidden=4, chunk=3)

    written = sample(model, alphabet, "The ", 60)

    assert written.startswith("The ")
    assert len(written) == 64
    assert set(written) <= set(alphabet)
    assert written == sample(model, alphabet, "The ", 60)
    assert written != sample(model, alphabet, "The ", 60, seed=1)


def test_a_sample_carries_the_state_from_character_to_character() -> None:
    """A model that only counts: after the third character its state lets it write nothing but b."""
    model = CharacterModel(2, 1, 2, chunk=1).double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
        # Update gate half open and candidate one: the state is 1/2, 3/4, 7/8, ...
        parameters["gru.bias_ih_l0"][2] = 100.0
        parameters["readout.weight"][1, 0] = 8000.0
        parameters["readout.bias"][0] = 6500.0

    assert sample(model, "ab", "a", 6) == "aaabbbb"


def test_the_character_model_breaks_nothing() -> None:
    report = tb.verify(character_model.build, max_examples=25, seed=1)

    assert not report.broken, report.as_text()


def test_every_property_of_the_character_model_can_be_judged() -> None:
    several = tb.Case(batch=2, steps=7, chunk=3, inputs=5, hidden=4, outputs=5, batches=2)
    one_chunk = tb.Case(batch=2, steps=3, chunk=3, inputs=5, hidden=4, outputs=5)

    reports = [tb.check(character_model.build(case), case) for case in (several, one_chunk)]

    judged = {verdict.name for report in reports for verdict in report.holds}
    without_dropout = {"each_chunk_draws_its_own_randomness"}
    assert judged == {judged.__name__ for judged in tb.PROPERTIES} - without_dropout


def test_the_verdict_on_the_character_model_is_about_its_loop() -> None:
    """The same model is found out where its loop forgets the state."""
    case = tb.Case(batch=2, steps=7, chunk=3, inputs=5, hidden=4, outputs=5)
    model = ForgetfulModel(5, 4, 5, chunk=3)

    report = tb.check(tb.Subject(model, loss=character_model.bits_per_character), case)

    assert "state_crosses_every_boundary" in [verdict.name for verdict in report.broken]


def test_the_documented_loop_takes_the_length_of_chunks_for_their_number() -> None:
    report = tb.verify(lightning_docs.build, max_examples=25, seed=1)

    verdict = report["chunks_tile_the_sequence"]
    assert [str(violation) for violation in verdict.violations] == [
        "chunks: 0-1, but should be 0-0 1-1"
    ]
    assert verdict.case == tb.Case(steps=2, chunk=1)


def test_the_documented_loop_stops_where_a_sequence_is_shorter_than_a_chunk() -> None:
    case = tb.Case(steps=2, chunk=3)

    report = tb.check(lightning_docs.build(case), case)

    (violation,) = report["training_reaches_the_end"].violations
    assert "Expected sequence length to be larger than 0" in violation.found


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        (
            20,
            ["chunks: 0-1 2-3 4-5 6-7 8-9 10-11 12-13 14-15 16-17 18-19, but should be 0-9 10-19"],
        ),
        (100, []),
    ],
)
def test_only_the_documented_sizes_hide_what_the_documented_loop_does(
    steps: int, found: list[str]
) -> None:
    case = tb.Case(steps=steps, chunk=10)

    report = tb.check(lightning_docs.build(case), case)

    violations = report["chunks_tile_the_sequence"].violations
    assert [str(violation) for violation in violations] == found


def test_even_the_documented_sizes_do_not_hide_it_from_a_run_that_is_resumed() -> None:
    """The 90 time steps after the first chunk are cut into tens of nine when they come alone."""
    case = tb.Case(steps=100, chunk=10)

    report = tb.check(lightning_docs.build(case), case)

    assert [verdict.name for verdict in report.broken] == ["a_run_can_be_resumed_at_any_boundary"]


def test_the_examples_say_their_verdicts_as_the_readme_quotes_them_and_succeed() -> None:
    _, _, behind = (ROOT / "README.md").read_text().partition("<!-- output -->\n```\n")
    quoted = [passage.strip() for passage in behind.partition("```")[0].split("…")]

    done = subprocess.run(
        [sys.executable, "-m", "examples"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(quoted) > 4
    for passage in quoted:
        assert passage in done.stdout


def test_the_examples_fail_where_a_verdict_is_not_as_due(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(character_model, "build", lightning_docs.build)
    monkeypatch.setattr(examples_main, "EXAMPLES", 5)

    assert examples_main.main() == 1

    assert "NOT AS EXPECTED, which would be: No property is broken" in capsys.readouterr().out
