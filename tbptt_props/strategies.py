"""Hypothesis strategies: sizes are drawn so that there is a boundary to see, and edges come up.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from hypothesis import strategies as st

from tbptt_props.case import Case, require_size

if TYPE_CHECKING:
    from torch import Tensor

_Option = TypeVar("_Option")

# What a case can be about: which T belong to a K. Nearly all kinds have two chunks or more; with
# one there is no boundary, and T and K drawn from one range leave just one in half of all examples.
KINDS: dict[str, Callable[[int, int], bool]] = {
    "two chunks or more": lambda k, t: t > k,
    "chunks of one time step": lambda k, t: t > k == 1,
    "one time step more than a chunk": lambda k, t: t == k + 1 > 2,
    "no tail": lambda k, t: t > k > 1 and t % k == 0,
    "as many chunks as time steps in one": lambda k, t: t == k * k > 1,
    "five chunks or more": lambda k, t: t > 4 * k,
    "one chunk": lambda k, t: t == k,
    "less than a chunk": lambda k, t: t < k,
}
MOST_CHUNK, MOST_STEPS = 6, 24  # at K = 6 still four chunks; at K = 4 still T = K²


def cases(**fixed: int) -> st.SearchStrategy[Case]:
    """Draw cases; a size that a subject can't vary is given by name, as in `cases(chunk=35)`.

    B, T and K differ unless the case is about two of them being equal, or B = 1. A size given by
    name is the same in every batch of the case.

    Raises:
        ValueError: no size has such a name (the message lists them), or its value is impossible.
    """
    for name, value in fixed.items():
        require_size(name, value)
    return _cases(tuple(sorted(fixed.items())))


def coverage(tried: Iterable[Case]) -> dict[str, int]:
    """Return how many of the cases are of each kind that there should be some of."""
    found = list(tried)
    count = {kind: sum(fits(c.chunk, c.steps) for c in found) for kind, fits in KINDS.items()}
    count["a tail"] = sum(case.steps % case.chunk > 0 for case in found)
    count["two boundaries or more"] = sum(case.steps > 2 * case.chunk for case in found)
    count["two sequences or more"] = sum(case.batch > 1 for case in found)
    count["two batches or more"] = sum(case.batches > 1 for case in found)
    count["batches of several sizes"] = sum(len({*case.sizes()}) > 1 for case in found)
    return count


def chunk_lengths(*, steps: int | None = None) -> st.SearchStrategy[int]:
    """Draw K, for sequences of T = `steps` if it is given: mostly so that there is a boundary.

    Raises:
        ValueError: `steps` is below 1.
    """
    return _lengths(steps=steps).map(lambda pair: pair[1])


def sequence_lengths(*, chunk: int | None = None) -> st.SearchStrategy[int]:
    """Draw T, for chunks of K = `chunk` if it is given: mostly so that there is a boundary.

    Raises:
        ValueError: `chunk` is below 1.
    """
    return _lengths(chunk=chunk).map(lambda pair: pair[0])


def states(like: Any) -> st.SearchStrategy[Any]:
    """Draw states of the structure of `like`: each tensor in it replaced, all else as it is.

    Values are zero, or standard normal at one of three scales, the largest of which saturates tanh.
    """
    from tbptt_props.state import leaves, map_tensors

    if not leaves(like):
        raise ValueError(f"like must hold at least one tensor, got like={like!r}")

    def grow(scale: float, seed: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(seed)

        def drawn(tensor: Tensor) -> Tensor:
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return (scale * values).to(tensor)

        return map_tensors(drawn, like)

    return st.builds(grow, st.sampled_from([0.0, 1.0, 0.01, 10.0]), _numbers(1023))


def batches(case: Case) -> st.SearchStrategy[list[tuple[Tensor, Tensor]]]:
    """Draw the batches of `case` with numbers of other seeds: inputs (B, T, I), targets (B, T, O).

    The sizes stay those of the case: only seeds are drawn that vary its batches alike.
    """
    from dataclasses import replace

    seeds = _numbers(1023).map(lambda n: 8 * n + case.seed % 8)
    return seeds.map(lambda seed: replace(case, seed=seed).tensors())


@lru_cache(maxsize=256)
def _pairs(kind: str, chunk: int | None, steps: int | None) -> tuple[tuple[int, int], ...]:
    """List the (T, K) of a kind, the smallest first."""
    # A length that is given may be large; the other one then has to follow it.
    chunks = [chunk] if chunk else range(1, (steps + 1 if steps else MOST_CHUNK) + 1)
    most = max(MOST_STEPS, 5 * (chunk or 0) + (chunk or 0) // 2)
    lengths = [steps] if steps else range(1, most + 1)
    return tuple(sorted((t, k) for k in chunks for t in lengths if KINDS[kind](k, t)))


def _evenly(options: Sequence[_Option]) -> st.SearchStrategy[_Option]:
    """Draw from `options` so that each comes up in any 100 draws; shrink to the first.

    Hypothesis favours some numbers and varies what it drew before, so that `sampled_from` may leave
    out an option for a whole run. The sum of several numbers, taken round, evens that out.
    """
    number = st.integers(0, len(options) - 1)
    return st.tuples(number, number, number).map(lambda n: options[sum(n) % len(options)])


def _lengths(
    *, chunk: int | None = None, steps: int | None = None
) -> st.SearchStrategy[tuple[int, int]]:
    """Draw (T, K): first what the case is to be about, then one of its pairs."""
    for name, value in (("chunk", chunk), ("steps", steps)):
        if value is not None:
            require_size(name, value)
    kinds = [pairs for pairs in (_pairs(kind, chunk, steps) for kind in KINDS) if pairs]
    most_steps, most_chunk = (max(size) for size in zip(*chain(*kinds), strict=True))

    # The same numbers mean the same T and K in every kind that has them, so that shrinking may turn
    # to a simpler kind of case and keep the sizes it has got to.
    def chosen(drawn: tuple[Sequence[tuple[int, int]], int, int]) -> tuple[int, int]:
        pairs, number, other = drawn
        k = _nearly(number, sorted({k for _, k in pairs}))
        return _nearly(other, [t for t, of in pairs if of == k]), k

    return st.tuples(_evenly(kinds), _numbers(most_chunk), _numbers(most_steps)).map(chosen)


def _nearly(drawn: int, options: Sequence[int]) -> int:
    return drawn if drawn in options else options[drawn % len(options)]


def _numbers(most: int) -> st.SearchStrategy[int]:
    """Draw a number up to `most`, in digits that are too small for Hypothesis' constants.

    Those it takes from whatever modules are loaded, so that one run would not repeat in another.
    """
    if most < 100:
        return st.integers(0, most)
    upper = _numbers(most // 64)
    return st.tuples(upper, st.integers(0, 63)).map(lambda digits: 64 * digits[0] + digits[1])


@st.composite
def _cases(draw: st.DrawFn, fixed: tuple[tuple[str, int], ...]) -> Case:
    given = dict(fixed)
    steps, chunk = draw(_lengths(chunk=given.get("chunk"), steps=given.get("steps")))
    width = st.integers(1, 4)
    strategies = {
        "batch": _batch_sizes(steps, chunk),
        "inputs": width,
        "hidden": width,
        "outputs": width,
        # Only a single batch of a single chunk is one ordinary update.
        "batches": _evenly([1, 2, 3] if steps > chunk else [1, 1, 1, 2]),
    }
    drawn = {n: given[n] if n in given else draw(sizes) for n, sizes in strategies.items()}
    # A size that is given by name must not vary from batch to batch, as seeds make sizes do.
    alike = (1 if "batch" in given else 0) | (2 if "steps" in given else 0)
    low = [bits for bits in range(4) if not bits & alike]
    seed = given["seed"] if "seed" in given else 4 * draw(_numbers(1023)) + draw(_evenly(low))
    if seed & alike and "batches" not in given:
        drawn["batches"] = 1
    return Case(steps=steps, chunk=chunk, seed=seed, **drawn)


def _batch_sizes(steps: int, chunk: int) -> st.SearchStrategy[int]:
    """Draw B: one sequence, or unlike T and K; once in a while equal to one of them on purpose."""
    unlike = [b for b in range(2, 6) if b not in (steps, chunk)]
    alike = [chunk, min(steps, MOST_CHUNK)]
    return _evenly([[1], unlike, unlike, unlike, alike]).flatmap(st.sampled_from)
