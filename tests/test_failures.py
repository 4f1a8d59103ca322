"""What a person reads of a broken loop, as a whole: a handful of faults, each on a small case."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.report import failure_text
from tbptt_props.search import replay
from tbptt_ref.faults import FAULTS

FAULT = {fault.name: fault for fault in FAULTS}
CASE = tb.Case(batch=2, steps=5, chunk=2, batches=2)
ALONE = tb.Case(steps=5, chunk=2)


def failure(name: str, case: tb.Case, judged: str) -> str:
    """Return what is said of a fault, without where in the repository it stands."""
    fault = FAULT[name]
    report = replay(lambda case: tb.Subject(fault.build(case), loss=mse_loss), case)
    text = failure_text(replace(report, subject=name), report[judged])
    return re.sub(r"(at +)\S+:\d+(\s+)", r"\1HERE\2", text)


TEXTS: Mapping[tuple[str, tb.Case, str], str] = {
    ("RetainsItsPast", ALONE, "graph_crosses_no_boundary"): """\
graph_crosses_no_boundary                                                  broken for RetainsItsPast
  No path leads from a chunk's loss into the graph of an earlier chunk.

  time steps 2-3, incoming state[0]: attached to the graph of time steps 0-1, but should be detached
  time steps 2-3, incoming state[1]: attached to the graph of time steps 0-1, but should be detached
  and 2 more of the kind

  gradients reach   01 23 4
  the loss of 0-1   ##
  the loss of 2-3   !! ##
  the loss of 4-4   !! !! #
  # as due, ! too far

  at                HERE   prediction, state = self(x, state)
  smallest case     Case(steps=5, chunk=2)
  likely cause      The state is carried into the next chunk with its graph, all of it
  try               state = tuple(s.detach() for s in state) after the update; a single tensor's own
                        state.detach() returns a new one and leaves the old as it is""",
    ("DetachesOnlyH", ALONE, "graph_crosses_no_boundary"): """\
graph_crosses_no_boundary                                                   broken for DetachesOnlyH
  No path leads from a chunk's loss into the graph of an earlier chunk.

  time steps 2-3, incoming state[1]: attached to the graph of time steps 0-1, but should be detached

  gradients reach   01 23 4
  the loss of 0-1   ##
  the loss of 2-3   !! ##
  # as due, ! too far

  at                HERE   prediction, (h, c) = self(x, state)
  smallest case     Case(steps=5, chunk=2)
  likely cause      One part of the state is detached and another is not: an LSTM's state is a pair
  try               state = tuple(s.detach() for s in state)""",
    ("DetachesEveryTimeStep", CASE, "gradients_span_the_whole_chunk"): """\
gradients_span_the_whole_chunk                                      broken for DetachesEveryTimeStep
  Gradients reach back through all time steps of the chunk: they are the loss's true slope.

  time steps 0-1, slope of the loss by its gradients: 1.45379, but should be 1.45765 by its values
  time steps 2-3, slope of the loss by its gradients: 1.31361, but should be 1.31184 by its values
  and 1 more of the kind

  gradients reach   01 23 4
  the loss of 0-1   -#
  the loss of 2-3      -#
  the loss of 4-4         #
  # as due, - not far enough

  at                HERE   prediction, state = self(x, state)
  smallest case     Case(batch=2, steps=5, chunk=2, batches=2)
  likely cause      Forward cuts the graph within a chunk: it detaches the state, or takes its .data
  try               detach the state between chunks alone, in training_step, and not in forward""",
    ("ForgetsState", ALONE, "state_crosses_every_boundary"): """\
state_crosses_every_boundary                                                 broken for ForgetsState
  A chunk starts from exactly the state in which the chunk before it ended.

  time steps 2-3, incoming state: none, but should be the one time steps 0-1 ended in
  time steps 4-4, incoming state: none, but should be the one time steps 2-3 ended in

  at                HERE   prediction, state = self(x, state)
  smallest case     Case(steps=5, chunk=2)
  likely cause      No state is handed to forward: a chunk starts as if it were the first
  try               prediction, state = self(x, state)""",
    ("CutsIntoKChunks", ALONE, "chunks_tile_the_sequence"): """\
chunks_tile_the_sequence                                                  broken for CutsIntoKChunks
  Every time step of every sequence is trained on once, in chunks of the promised length.

  chunks: 0-2 3-4, but should be 0-1 2-3 4-4

  at                HERE   prediction, state = self(x, state)
  smallest case     Case(steps=5, chunk=2)
  likely cause      The length of a chunk is taken for the number of chunks
  try               x.split(k, dim=1): chunk(k) and tensor_split(k) make k chunks, not chunks of k
  likely cause      The first cut comes after K + 1 time steps: it is counted one too far
  try               if (t + 1) % k == 0, with t counted from 0""",
    ("NeverClears", ALONE, "events_come_in_a_legal_order"): """\
events_come_in_a_legal_order                                                  broken for NeverClears
  Gradients are clear before backward, which comes after forward and before the update.

  time steps 2-3, gradients before backward: not clear (core.weight_ih_l0 and 5 more), but should be
      cleared by zero_grad
  time steps 4-4, gradients before backward: not clear (core.weight_ih_l0 and 5 more), but should be
      cleared by zero_grad

  at                HERE   self.manual_backward(loss)
  smallest case     Case(steps=5, chunk=2)
  likely cause      Gradients of an earlier chunk are still there when backward adds its own
  try               optimizer.zero_grad() before every chunk's backward""",
    ("UpdatesTwice", ALONE, "each_chunk_updates_once"): """\
each_chunk_updates_once                                                      broken for UpdatesTwice
  Each optimizer makes one update per chunk.

  time steps 0-1, updates: 2, but should be 1
  time steps 2-3, updates: 2, but should be 1
  time steps 4-4, updates: 2, but should be 1

  at                HERE   optimizer.step()
  smallest case     Case(steps=5, chunk=2)
  likely cause      More than one update is made with one gradient
  try               one optimizer.step() a chunk""",
    ("KeepsLosses", ALONE, "no_graph_outlives_its_chunk"): """\
no_graph_outlives_its_chunk                                                   broken for KeepsLosses
  When the next chunk is done, nothing holds a chunk's graph any more.

  time steps 0-1: its graph lives on after the next chunk, but should be gone, and its memory free
  time steps 2-3: its graph lives on after the next chunk, but should be gone, and its memory free

  smallest case     Case(steps=5, chunk=2)
  likely cause      Losses, predictions or states are collected with their graphs, and keep them
                        alive
  try               losses.append(loss.detach()), total += loss.detach()""",
}


@pytest.mark.parametrize(("told", "due"), TEXTS.items(), ids=lambda item: str(item)[:30])
def test_a_failure_reads_as_a_whole(told: tuple[str, tb.Case, str], due: str) -> None:
    assert failure(*told) == due


def test_the_readme_shows_the_map_that_a_failure_has() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- reach -->\n```\n")[2].partition("```")[0]

    assert shown in failure("RetainsItsPast", ALONE, "graph_crosses_no_boundary")


def test_an_update_that_comes_too_early_is_told_as_that_alone() -> None:
    told = failure("UpdatesBeforeBackward", ALONE, "events_come_in_a_legal_order")

    assert "events: forward → update → backward" in told
    assert "cleared" not in told


def test_a_boundary_that_the_loop_does_not_have_is_told_as_missing() -> None:
    told = failure("NeverCuts", ALONE, "a_run_can_be_resumed_at_any_boundary")

    assert "from time step 2 on: no chunk starts there, but should be one to go on with" in told
