"""Decisions of the promotion gate on real images: candidates that are worse, equal or better, at many seeds.

    python -m benchmarks.promotion STORAGE

The champion of STORAGE, a model of procedural scenes, samples the same captions with each seed. Candidates that must be
refused: its stack with weak guidance, its images of other captions, the same images, and its images of another seed, which are as
good. It must itself be promoted over the first two. Ends with 1 if a decision is wrong.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.published import find_stack
from tasks.promotion import PromotionConfig, compare
from tasks.scoring import scores_table
from tasks.stages.evaluate import scene_captions
from unclip import config
from unclip.evaluation.metrics import Sampled, concatenate, extract_features, measure
from unclip.systems.system import find_system, load_stack, read_stack, sample_batch

BATCH = 64
"""Captions that are sampled together."""
WEAK_GUIDANCE = 0.5
SHIFT = 1
"""Places by which captions are shifted against images: most describe another scene then."""


def scorer(storage: str, captions: Sequence[str]) -> Callable[[int, float | None], tuple[pa.Table, pa.Table]]:
    """Load the champion; return a function of a seed and a guidance scale.

    It returns the scores of the champion's images, and of the same images under captions that are shifted.
    """
    stack = read_stack(find_stack(storage, None))
    system, spec = load_stack(stack), find_system(stack.system)
    clip: Any = getattr(system, "clip", None)
    if clip is None or "guidance_scale" not in spec.shortcuts:
        raise SystemExit(
            f"{storage}: expected a champion of a system with a CLIP and a guidance scale, such as unclip."
        )
    shifted = [*captions[SHIFT:], *captions[:SHIFT]]

    def score(seed: int, guidance_scale: float | None) -> tuple[pa.Table, pa.Table]:
        values: Any = config.to_dict(system.sampling)
        if guidance_scale is not None:
            values = config.override(values, f"{spec.shortcuts['guidance_scale']}={guidance_scale}")
        sampling: Any = config.load(spec.sampling, values)
        features: tuple[list[Any], list[Any]] = ([], [])
        for number, start in enumerate(range(0, len(captions), BATCH)):
            rows = slice(start, start + BATCH)
            images = sample_batch(system, captions[rows], number, seed=seed, sampling=sampling)
            for found, described in zip(features, (captions, shifted), strict=True):
                found.append(extract_features(clip, images, described[rows]))
        tables = []
        for found, described in zip(features, (captions, shifted), strict=True):
            estimates = measure(Sampled(described, concatenate(iter(found), len(captions))))
            tables.append(scores_table({"heldout": described}, {"heldout": estimates}))
        return tables[0], tables[1]

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", help="storage with a champion; only read")
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=256, help="captions of each decision (default: %(default)s)")
    arguments = parser.parse_args()
    captions = scene_captions(arguments.captions, 0)
    score, settings = scorer(arguments.storage, captions), PromotionConfig()
    before, _ = score(arguments.seeds, None)
    wrong: dict[str, int] = {}
    accuracies = []
    for seed in range(arguments.seeds):
        (champion, shuffled), (weak, _) = score(seed, None), score(seed, WEAK_GUIDANCE)
        for name, candidate, present, is_better in (
            ("weak guidance", weak, champion, False),
            ("other captions", shuffled, champion, False),
            ("the same images", champion, champion, False),
            ("another seed", champion, before, False),
            ("better than weak guidance", champion, weak, True),
            ("better than other captions", champion, shuffled, True),
        ):
            decision = compare(candidate, present, settings)
            wrong[name] = wrong.get(name, 0) + (decision.is_better != is_better)
            if decision.is_better != is_better:
                print(f"seed {seed}: {name}: {decision.reason}", flush=True)
        before = champion
        accuracies.append([np.nanmean(table["accuracy.all"].to_numpy(False)) for table in (champion, weak, shuffled)])
        print(f"seed {seed}: accuracy.all {' '.join(f'{value:.3f}' for value in accuracies[-1])}", flush=True)
    means = np.mean(accuracies, axis=0)
    print(f"accuracy.all of champion, weak guidance, other captions: {means[0]:.3f}, {means[1]:.3f}, {means[2]:.3f}")
    for name, number in wrong.items():
        print(f"{name:<28} {number} of {arguments.seeds} decisions wrong")
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
