"""Diffusion processes in the terms of diffusers' schedulers."""

from typing import Any

from unclip.diffusion.process import DiffusionConfig, PredictionType
from unclip.diffusion.schedules import BETA_ENDS, Schedule

SCHEDULES: dict[Schedule, str] = {
    "cosine": "squaredcos_cap_v2",
    "linear": "linear",
    "scaled_linear": "scaled_linear",
}
PREDICTION_TYPES: dict[PredictionType, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def describe(process: DiffusionConfig) -> dict[str, Any]:
    """Settings of a process that all schedulers share; `beta_start` and `beta_end` have no effect on the cosine schedule."""
    scale = 1000 / process.num_timesteps
    first, last = BETA_ENDS.get(process.schedule, BETA_ENDS["linear"])
    return {
        "num_train_timesteps": process.num_timesteps,
        "beta_schedule": SCHEDULES[process.schedule],
        "beta_start": scale * first,
        "beta_end": scale * last,
        "prediction_type": PREDICTION_TYPES[process.prediction_type],
        "rescale_betas_zero_snr": process.zero_terminal_snr,
    }
