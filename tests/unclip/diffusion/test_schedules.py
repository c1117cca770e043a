import pytest
import torch

from unclip.diffusion import schedules
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.errors import ConfigError
from unclip.interop import schedulers

SCHEDULES: tuple[schedules.Schedule, ...] = ("cosine", "linear", "scaled_linear")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_schedules_end_in_noise(schedule: schedules.Schedule, num_timesteps: int) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps, schedule))
    assert ((diffusion.betas > 0) & (diffusion.betas < 1)).all()
    assert (diffusion.alphas_cumprod.diff() < 0).all()
    assert diffusion.alphas_cumprod[-1] < 5e-3


def test_cosine_schedule_matches_the_paper() -> None:
    """Nichol & Dhariwal 2021, eq. 17, halfway through: cos^2((0.5 + s) / (1 + s) * pi / 2) / f(0)."""
    alphas_cumprod = GaussianDiffusion(DiffusionConfig(1000, "cosine")).alphas_cumprod
    assert alphas_cumprod[499].item() == pytest.approx(0.4938, abs=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rescaled", [False, True])
def test_schedules_match_diffusers(schedule: schedules.Schedule, rescaled: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    process = DiffusionConfig(1000, schedule, "v", zero_terminal_snr=rescaled)
    expected = diffusers.DDPMScheduler(**schedulers.describe(process))
    ours = GaussianDiffusion(process)
    torch.testing.assert_close(ours.betas.float(), expected.betas, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.alphas_cumprod.float(), expected.alphas_cumprod, atol=2e-5, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_beta(schedule: schedules.Schedule) -> None:
    betas = schedules.betas(schedule, 1000)
    rescaled = torch.cumprod(1 - schedules.zero_terminal_snr(betas), dim=0)
    assert rescaled[-1] == 0
    assert rescaled[0].item() == pytest.approx(1 - betas[0].item(), abs=1e-12)
    assert (rescaled.diff() < 0).all()


def test_eps_cannot_be_predicted_from_pure_noise() -> None:
    with pytest.raises(ConfigError, match="prediction_type: got 'eps', expected x0 or v with zero_terminal_snr"):
        DiffusionConfig(zero_terminal_snr=True)


def test_snr() -> None:
    torch.testing.assert_close(schedules.snr(torch.tensor([0.0, 0.5, 0.9])), torch.tensor([0.0, 1.0, 9.0]))


def test_strided_timesteps() -> None:
    assert schedules.strided_timesteps(1000, 1) == [999]
    assert schedules.strided_timesteps(1000, 2) == [999, 0]
    assert schedules.strided_timesteps(9, 5) == [8, 6, 4, 2, 0]
    assert schedules.strided_timesteps(4, 100) == [3, 2, 1, 0]
    with pytest.raises(ConfigError, match="num_steps: got 0, expected at least 1"):
        schedules.strided_timesteps(10, 0)


@pytest.mark.parametrize("num_steps", [2, 25, 64, 250, 1000])
def test_strides_match_published_unclip_pipelines(num_steps: int) -> None:
    scheduler = pytest.importorskip("diffusers").UnCLIPScheduler(1000)
    scheduler.set_timesteps(num_steps)
    assert schedules.strided_timesteps(1000, num_steps) == scheduler.timesteps.tolist()


def test_sections_have_their_own_density() -> None:
    """Nichol & Dhariwal's example: 10, 15 and 20 steps in the thirds of 300."""
    timesteps = schedules.sectioned_timesteps(300, (10, 15, 20))
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert [sum(start <= t < start + 100 for t in timesteps) for start in (0, 100, 200)] == [10, 15, 20]
    assert {0, 99, 100, 199, 200, 299} <= set(timesteps)
    assert schedules.sectioned_timesteps(1000, (27,)) == schedules.strided_timesteps(1000, 27)
    assert schedules.sectioned_timesteps(7, (3, 2, 1)) == [5, 4, 3, 2, 1, 0]


def space_timesteps(num_timesteps: int, section_counts: tuple[int, ...]) -> list[int]:
    """Oracle, written from the rule of the published code: each section counts up from its start with its own stride."""
    size, extra = divmod(num_timesteps, len(section_counts))
    start, taken = 0, list[int]()
    for index, count in enumerate(section_counts):
        length = size + 1 if index < extra else size
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            taken.append(start + round(position))
            position += stride
        start += length
    return taken[::-1]


@pytest.mark.parametrize(
    ("num_timesteps", "counts"),
    [(1000, (1,)), (1000, (1, 1, 1)), (4000, (25, 1, 10)), (301, (10, 1, 20)), (1000, (10, 10, 3, 2, 1))],
)
def test_f139_sections_of_one_step_start_where_the_section_starts(num_timesteps: int, counts: tuple[int, ...]) -> None:
    assert schedules.sectioned_timesteps(num_timesteps, counts) == space_timesteps(num_timesteps, counts)


@pytest.mark.parametrize(("counts", "message"), [((4, 3), r"section_counts\[0\]: got 4"), ((), "section_counts: got")])
def test_invalid_sections_are_rejected(counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedules.sectioned_timesteps(6, counts)


def test_respaced_betas_give_the_same_marginals() -> None:
    alphas_cumprod = torch.cumprod(1 - schedules.betas("cosine", 1000), dim=0)
    timesteps = schedules.sectioned_timesteps(1000, (10, 5))
    respaced = torch.cumprod(1 - schedules.respaced_betas(alphas_cumprod, timesteps).flip(0), dim=0).flip(0)
    torch.testing.assert_close(respaced, alphas_cumprod[timesteps], atol=1e-12, rtol=1e-9)
    whole = schedules.respaced_betas(alphas_cumprod, range(999, -1, -1))
    torch.testing.assert_close(whole.flip(0), schedules.betas("cosine", 1000), atol=1e-9, rtol=0)
