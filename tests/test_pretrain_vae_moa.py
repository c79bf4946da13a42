"""pretrain_vae_moa.py: data, formulas, what each objective moves, scores, resuming, odd games, and bad input."""

from __future__ import annotations

import copy
import csv
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pettingzoo
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Discrete
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "pretrain_vae_moa.py"
sys.path.insert(0, str(ROOT))

import pretrain_vae_moa as moa  # noqa: E402
from envs import stag_hunt  # noqa: E402
from envs.records import Record, read_records, save_records  # noqa: E402
from pretrain_vae_moa import MOA, Args, Records, Sampler, confusion, main, score  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")
CONTEXTS = ("1", "4", "history")

TINY = {
    "rows": 1_200, "total_timesteps": 60, "eval_frequency": 20, "checkpoint_frequency": 15, "eval_episodes": 6,
    "batch_size": 16, "run_name": "run", "env_id": "4p5b4x4",
}  # fmt: skip


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing is most of a tiny run's time; the smoke test looks at real pictures."""
    blank = Image.new("RGB", (8, 8))
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: blank.save(file, format="png"))


@pytest.fixture
def tiny(tmp_path, data_dir) -> Callable[..., Args]:
    return lambda **changes: Args(**{**TINY, "runs_dir": str(tmp_path), "data_dir": data_dir, **changes})


@pytest.fixture(scope="session")
def data() -> Record:
    return stag_hunt.collect(4_000, seed=2)


@pytest.fixture
def double():
    """Everything in 64 bits, so that a comparison with a plain formula is about the formula, not about rounding."""
    torch.set_default_dtype(torch.float64)


def records_of(data: Record, context="1") -> Records:
    return Records(data.arrays, data.meta, context, CPU)


def make_model(records: Records, seed=0, **changes) -> MOA:
    torch.manual_seed(seed)
    return MOA(Args(**{"context": records.context, "latent_dim": 5, **changes}), records.sizes, CPU)


def exit_status(args: Args) -> int:
    """Run `main` here and return the status that the process would have ended with."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    status = 0
    try:
        main(args)
    except SystemExit as end:
        status = end.code
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]  # given back
    return status


def tensors(value, name="") -> dict[str, Tensor]:
    """All tensors and numbers of a nested state, by their path."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, bool | int | float):
        return {name: torch.tensor(value)}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, part in items for path, leaf in tensors(part, f"{name}/{key}").items()}
    return {}


def outcome(folder: Path) -> dict[str, Tensor | bytes]:
    """What two equal runs have in common: weights, the finished checkpoint, and all that is written down."""
    result = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    assert "eval.csv" in result
    for path in folder.glob("*.npz"):
        with np.load(path) as file:
            result |= {f"{path.name}/{name}": torch.from_numpy(file[name]) for name in file.files}
    for file in ("model.pt", "best_model.pt", "checkpoint.pt"):
        result |= tensors(torch.load(folder / file, weights_only=True), file)
    return result


def differences(one: dict, other: dict) -> list[str]:
    def same(name: str) -> bool:
        a, b = one.get(name), other.get(name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and a.nan_to_num().equal(b.nan_to_num())
        return a == b

    return [name for name in {**one, **other} if not same(name)]


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def snapshot(model: MOA) -> dict[str, Tensor]:
    return copy.deepcopy(tensors({name: getattr(model, name).state_dict() for name in ("encoder", "decoder", "head")}))


def moved(before: dict[str, Tensor], model: MOA) -> set[str]:
    return {name.split("/")[1] for name in differences(before, snapshot(model))}


# --- batches ---
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_batch_holds_what_the_record_says(context, data):
    records, arrays = records_of(data, context), data.arrays
    rows = records.rows(0)[[0, 3, 500, 77, 1_200]]
    units = torch.from_numpy(records.units(records.rows(0))[[0, 4, 33]] if context == "history" else rows)
    if context == "history":
        rows = np.concatenate(
            [np.arange(s, s + n) for s, n in zip(records.starts[units], records.lengths[units], strict=True)]
        )
    batch = records.batch(units)
    assert torch.equal(batch.action, torch.from_numpy(arrays["action"][rows]).long())
    assert torch.equal(batch.mask, torch.from_numpy(arrays["action_mask"][rows]))
    assert batch.time.numpy() == pytest.approx(arrays["t"][rows] / 18)
    assert batch.frames.dtype == torch.float32
    key = ("episode", "agent", "t")
    index = {tuple(values): i for i, values in enumerate(zip(*(arrays[k].tolist() for k in key), strict=True))}
    for i, row in enumerate(rows):
        wanted = []
        for back in range(4 if context == "4" else 1):
            then = index.get((arrays["episode"][row], arrays["agent"][row], arrays["t"][row] - back))
            wanted.append(np.zeros((7, 8, 8)) if then is None else arrays["obs"][then])
        assert (batch.frames[i, :-2].numpy() == np.concatenate(wanted)).all()
        assert batch.frames[i, -2, :, 3].numpy() == pytest.approx(np.arange(8) / 7)
        assert batch.frames[i, -1, 5].numpy() == pytest.approx(np.arange(8) / 7)
    if context == "history":
        assert batch.sequences == 3 and batch.length == records.lengths[units].max()
        assert (batch.slot // batch.length).tolist() == np.repeat([0, 1, 2], records.lengths[units]).tolist()
        assert (batch.slot % batch.length).tolist() == arrays["t"][rows].tolist()
        assert (batch.previous.sum(2) == 1).all()
        shown = batch.previous.argmax(2).numpy()
        assert (np.where(shown == 7, -1, shown) == arrays["prev_actions"][rows]).all()


@pytest.mark.parametrize("context", CONTEXTS)
def test_each_pass_sees_every_row_once(context, data):
    records = records_of(data, context)
    rows = records.rows(0)
    sampler = Sampler(records, rows, 32, seed=4)
    assert abs(sampler.size * len(rows) / len(sampler.units) - 32) < 8  # about as many rows in a batch
    seen = torch.cat([sampler.draw(step) for step in range(sampler.batches)])
    assert len(seen.unique()) == len(seen) > len(sampler.units) - sampler.size
    assert set(seen.tolist()) <= set(records.units(rows).tolist())
    assert not torch.equal(sampler.draw(0), sampler.draw(sampler.batches))  # another order
    other = Sampler(records, rows, 32, seed=4)
    assert torch.equal(other.draw(sampler.batches + 3), sampler.draw(sampler.batches + 3))  # from any step on
    assert not torch.equal(Sampler(records, rows, 32, seed=5).draw(0), sampler.draw(0))


def test_splits_share_no_episode(data):
    records = records_of(data)
    episodes = [set(data.arrays["episode"][records.rows(split)].tolist()) for split in range(3)]
    assert all(episodes) and not (episodes[0] & episodes[1] or episodes[0] & episodes[2] or episodes[1] & episodes[2])
    assert sum(len(records.rows(split)) for split in range(3)) == 4_000
    few = set(data.arrays["episode"][records.rows(2, 3)].tolist())
    assert len(few) == 3 and few < episodes[2]


def test_probes_are_fitted_to_whole_training_episodes(data):
    records = records_of(data, "history")
    rows = records.probe_rows(300)
    assert 300 <= len(rows) < 400 and set(rows.tolist()) <= set(records.rows(0).tolist())
    chosen = np.isin(data.arrays["episode"], data.arrays["episode"][rows])
    assert chosen.sum() == len(rows)


# --- mirrored and turned boards ---
def played(data: Record, rows: np.ndarray, turn: int, order: np.ndarray) -> stag_hunt.VectorStagHunt:
    """The games of some rows on a board turned by hand, in coordinates, with the players in another order."""

    def turned(places: np.ndarray) -> np.ndarray:
        row, column = np.divmod(places, 8)
        if turn & 4:
            row, column = column, row
        if turn & 1:
            row = 7 - row
        if turn & 2:
            column = 7 - column
        return np.where(places < 64, row * 8 + column, 64)

    games = stag_hunt.VectorStagHunt(stag_hunt.Config(), np.zeros(len(rows)))
    flat = data.arrays["obs"][rows].reshape(len(rows), 7, 64)
    places = np.where(flat[:, :4].any(2), flat[:, :4].argmax(2), 64)
    games.players = turned(places)[:, order]
    games.stags = turned(np.where(flat[:, 5].any(1), flat[:, 5].argmax(1), 64)[:, None])
    games.hares = np.full((len(rows), 4), 64)
    for i, plane in enumerate(flat[:, 6]):
        games.hares[i, : plane.sum()] = turned(np.flatnonzero(plane))
    return games


@pytest.mark.parametrize("turn", range(8))
def test_a_turned_game_is_the_same_game(turn, data):
    """What the game shows and allows on the turned board, and what its players do there, is what the batch becomes."""
    records = records_of(data)
    rows = np.arange(0, 4_000, 40)
    order = np.array([0, 2, 3, 1])
    batch = records.batch(torch.from_numpy(rows))
    world = torch.full((100,), turn), torch.tensor(order).repeat(100, 1)
    after = records.batch(torch.from_numpy(rows), world)
    games = played(data, rows, turn, order)
    agents = np.zeros(100, int)
    views = stag_hunt.planes(
        stag_hunt.ego_first(games.players, agents), games.stags, games.hares, games.blocked, games.config
    )
    assert (after.frames[:, :7].numpy() == views).all()
    legal = games.legal()
    assert (after.mask.numpy() == legal[:, 0]).all()
    likely = games.policy_probabilities(("NS", "NH"), legal)[:, 0]
    did = likely[np.arange(100), data.arrays["strategy"][rows], after.action.numpy()]
    # Of two hares as near, the first in reading order counts: on a turned board it may be the other.
    assert (did > 0).mean() > (0.999 if turn == 0 else 0.9)
    stags = data.arrays["strategy"][rows] == 0
    assert (did[stags] > 0).all()
    if turn == 0:
        assert torch.equal(after.action, batch.action) and torch.equal(after.frames[:, -2:], batch.frames[:, -2:])
    else:
        assert not torch.equal(after.frames[:, -2:], batch.frames[:, -2:])


def test_other_games_are_never_turned(data):
    """A record with scripts on a square board, whose actions are not the stag hunt's."""
    assert records_of(data).symmetry and records_of(data).strategies
    theirs = Record(data.arrays, {**data.meta, "action_names": ["a", "b", "c", "d", "e", "f", "g"]})
    assert records_of(theirs).symmetry is None and records_of(theirs).strategies
    unknown = np.where(np.arange(len(data.arrays["strategy"])) == 3, -1, data.arrays["strategy"])
    assert records_of(Record({**data.arrays, "strategy": unknown}, data.meta)).strategies == []


@pytest.mark.parametrize("context", ["4", "history"])
def test_all_frames_of_a_row_are_turned_alike(context, data):
    records = records_of(data, context)
    symmetry = records.symmetry
    units = torch.from_numpy(records.units(records.rows(0))[5:9])
    batch = records.batch(units)
    torch.manual_seed(0)
    turn, order = symmetry.draw(4)
    assert (order[:, 0] == 0).all() and (order.sort(1).values == torch.arange(4)).all()
    after = records.batch(units, (turn, order))
    single = records_of(data, "1")
    unit = batch.slot // batch.length if context == "history" else torch.arange(4)
    rows = records.rows_of(units)[0]
    for back in range(4 if context == "4" else 1):
        for i, row in enumerate(rows.tolist()):
            world = turn[unit[i]][None], order[unit[i]][None]
            wanted = single.batch(torch.tensor([max(row - back, 0)]), world).frames[0, :7]
            if back > records.position[row]:
                wanted = torch.zeros_like(wanted)
            assert torch.equal(after.frames[i, 7 * back : 7 * back + 7], wanted)
    if context == "history":
        for i in range(len(rows)):
            for j in range(4):
                old = batch.previous[i, order[unit[i], j]].argmax()
                new = after.previous[i, j].argmax()
                assert new == symmetry.turned_action[turn[unit[i]], old] and (new == 7) == (old == 7)


# --- networks ---
def test_the_history_reaches_back_and_never_ahead(data):
    records = records_of(data, "history")
    model = make_model(records)
    units = torch.from_numpy(records.units(records.rows(0)))
    long = units[torch.from_numpy(records.lengths)[units] >= 6][:3]
    batch = records.batch(long)
    mean, log_variance = model.encoder(batch)
    alone = [model.encoder(records.batch(long[i : i + 1]))[0] for i in range(3)]
    assert torch.allclose(mean, torch.cat(alone), atol=1e-6)  # a sequence knows nothing of its neighbours
    changed = batch._replace(frames=batch.frames.clone())
    changed.frames[3] = 0.5  # in the first sequence
    difference_ = (model.encoder(changed)[0] - mean).abs().amax(1) > 1e-6
    first = int(records.lengths[long[0]])
    assert difference_.tolist() == [False] * 3 + [True] * (first - 3) + [False] * (len(mean) - first)
    assert mean.shape == log_variance.shape == (len(batch.time), 5)


def test_four_frames_are_seen(data):
    records = records_of(data, "4")
    model, rows = make_model(records), torch.tensor([7])
    assert records.position[7] >= 3
    batch = records.batch(rows)
    for back in range(4):
        frames = batch.frames.clone()
        frames[:, 7 * back] = 0.0
        assert not torch.equal(model.encoder(batch._replace(frames=frames))[0], model.encoder(batch)[0])


@pytest.mark.parametrize("head_input", ["z", "state", "state+z"])
def test_the_head_sees_what_it_is_told_to(head_input, data):
    records = records_of(data)
    model = make_model(records, head_input=head_input)
    batch = records.batch(torch.arange(20))
    z = model.encoder(batch)[0]
    logits = model.head(z, batch)
    assert torch.equal(logits.isinf(), ~batch.mask)
    elsewhere = batch._replace(frames=batch.frames.flip(2))
    for changed, sees in (
        (model.head(z + 1, batch), "z" in head_input), (model.head(z, elsewhere), "state" in head_input),
        (model.head(z, batch._replace(time=batch.time + 0.3)), True),
    ):  # fmt: skip
        assert torch.equal(changed, logits) != sees


@pytest.mark.parametrize("size", [4, 5, 8, 11])
def test_frames_of_any_size_come_back_in_that_size(size):
    data = stag_hunt.collect(60, stag_hunt.Config(size=size), max_cycles=5, seed=1)
    records = records_of(data)
    batch = records.batch(torch.arange(10))
    model = make_model(records)
    assert model.decoder(model.encoder(batch)[0]).shape == (10, 7, size, size)


# --- losses and updates ---
@pytest.mark.parametrize("objective", ["reconstruction", "moa", "both"])
def test_the_losses_are_the_formulas(objective, data, double):
    records = records_of(data)
    model = make_model(records, objective=objective, reconstruction_weight=0.3)
    batch = records.batch(torch.arange(50, 80))
    batch = batch._replace(frames=batch.frames.double(), time=batch.time.double())
    noise = torch.randn(30, 5)
    with torch.no_grad():
        losses = model.losses(batch, 0.7, noise)
        mean, log_variance = model.encoder(batch)
        z = mean + torch.exp(log_variance / 2) * noise
        logits, drawn = model.head(z, batch).numpy(), torch.sigmoid(model.decoder(z)).numpy()
    m, v = mean.numpy(), np.exp(log_variance.numpy())
    kl = (0.5 * (m**2 + v - 1 - np.log(v))).sum(1).mean()
    frame = batch.frames[:, :7].numpy()
    reconstruction = -(frame * np.log(drawn) + (1 - frame) * np.log(1 - drawn)).sum((1, 2, 3)).mean()
    chosen = logits[np.arange(30), batch.action.numpy()]
    policy = (np.log(np.exp(logits).sum(1)) - chosen).mean()  # one softmax, over the legal actions
    parts = {"kl": kl, "reconstruction": reconstruction, "policy": policy}
    total = 0.7 * kl
    total += 0.3 * reconstruction * (objective != "moa") + policy * (objective != "reconstruction")
    assert float(losses["total"]) == pytest.approx(total, rel=1e-9)
    for name, value in parts.items():
        if name in losses:
            assert float(losses[name]) == pytest.approx(value, rel=1e-9)
    assert ("policy" in losses) == (objective != "reconstruction")
    assert ("reconstruction" in losses) == (objective != "moa")
    if objective != "moa":
        assert float(losses["reconstruction_mse"]) == pytest.approx(((drawn - frame) ** 2).mean(), rel=1e-9)


@pytest.mark.parametrize("head_input", ["z", "state", "state+z"])
@pytest.mark.parametrize("objective", ["reconstruction", "moa", "both"])
def test_the_objective_moves_its_modules_and_no_others(objective, head_input, data):
    records = records_of(data)
    model = make_model(records, objective=objective, head_input=head_input, kl_weight=1.0, kl_warmup=0)
    before = snapshot(model)
    for step in range(1, 4):
        model.update(records.batch(torch.arange(20)), step)
    wanted = {"reconstruction": {"encoder", "decoder"}, "moa": {"encoder", "head"}}
    assert moved(before, model) == wanted.get(objective, {"encoder", "decoder", "head"})
    names = [name for part in model.used for name, _ in getattr(model, part).named_parameters()]
    assert len(names) == len(model.optimizer.param_groups[0]["params"])
    after = snapshot(model)
    still = [name for name in before if name.split("/")[1] in model.used and torch.equal(before[name], after[name])]
    assert not still  # every single parameter of the modules in use has moved


def test_with_a_bottleneck_the_action_shapes_z_and_past_it_hardly():
    """The gradient of the policy's loss reaches the encoder through z alone."""
    data = stag_hunt.collect(200, seed=1)
    records = records_of(data)
    for head_input, reached in (("z", True), ("state", False), ("state+z", True)):
        model = make_model(records, head_input=head_input, objective="moa", kl_weight=0.0)
        model.losses(records.batch(torch.arange(50)), 0.0)["total"].backward()
        gradient = sum(float(p.grad.abs().sum()) for p in model.encoder.parameters() if p.grad is not None)
        assert (gradient > 0) == reached


def test_each_update_is_one_step_of_the_same_adam(data):
    records = records_of(data)
    model = make_model(records, total_timesteps=10)
    optimizer = model.optimizer
    rates, moments = [], None
    for step in range(4):
        model.update(records.batch(torch.arange(20)), step)
        assert model.optimizer is optimizer
        state = optimizer.state[next(model.head.parameters())]
        assert float(state["step"]) == step + 1
        rates.append(optimizer.param_groups[0]["lr"])
        assert moments is None or not torch.equal(state["exp_avg"], moments)
        moments = state["exp_avg"].clone()
    assert rates == pytest.approx([5e-4 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(4)])
    still = make_model(records, anneal_lr=False)
    still.update(records.batch(torch.arange(20)), 9_000)
    assert still.optimizer.param_groups[0]["lr"] == 5e-4
    assert optimizer.param_groups[0]["eps"] == 1e-5


def test_the_weight_of_the_kl_rises(data):
    model = make_model(records_of(data))
    assert model.alpha(0) == 0.0
    assert model.alpha(20_000) == pytest.approx(1e-4 * (1 - math.exp(-1)))
    assert make_model(records_of(data), kl_warmup=0).alpha(1) == 1e-4


def test_the_gradient_is_clipped(data):
    records = records_of(data)
    model = make_model(records, max_grad_norm=0.01)
    norm = model.update(records.batch(torch.arange(20)))["gradient_norm"]
    assert float(norm) > 0.1  # the norm before clipping is what is told
    total = torch.stack([p.grad.square().sum() for p in model.trained]).sum().sqrt()
    assert float(total) == pytest.approx(0.01, rel=1e-3)


def overfit(model: MOA, records: Records, steps=300) -> float:
    """The cross-entropy of 32 rows, seen again and again, without noise."""
    units = torch.from_numpy(records.units(records.rows(0)))
    units = units[:3] if records.context == "history" else units[:1_024:32]
    batch = records.batch(units)
    noise = torch.zeros(len(batch.time), model.args.latent_dim)
    for _ in range(steps):
        model.update(batch, 0, noise)
    with torch.no_grad():
        return float(F.cross_entropy(model.head(model.encoder(batch)[0], batch), batch.action))


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_few_rows_are_learnt_by_heart(context, data):
    records = records_of(data, context)
    assert overfit(make_model(records, objective="moa", learning_rate=2e-3, anneal_lr=False), records) < 0.05


def test_a_double_softmax_cannot_learn_them(data):
    """Its loss has a floor of ln(e + 6) - 1 with 7 classes, far above 0.05."""
    records = records_of(data)

    class Doubled(MOA):
        def policy_loss(self, logits, action):
            return F.cross_entropy(logits.softmax(1), action)

    torch.manual_seed(0)
    model = Doubled(Args(objective="moa", learning_rate=2e-3, anneal_lr=False, latent_dim=5), records.sizes, CPU)
    overfit(model, records)
    batch = records.batch(torch.from_numpy(records.rows(0)[:1_024:32]))
    loss = float(model.losses(batch, 0.0, torch.zeros(32, 5))["policy"].detach())
    assert math.log(math.e + 6) - 1 - 1e-6 <= loss < 1.4


# --- scores ---
def test_scores_by_hand(data):
    records, arrays = records_of(data), data.arrays
    rows = np.array([0, 40, 80, 900])
    action = arrays["action"][rows].astype(int)
    q = np.full((4, 7), 0.01)
    q[np.arange(4), action] = 0.9  # right, sure
    q[1, action[1]], q[1, (action[1] + 1) % 7] = 0.2, 0.7  # second
    q[2] = np.linspace(0.3, 0.1, 7)
    q[2, action[2]] = 0.001  # last
    q /= q.sum(1, keepdims=True)
    result = score(q, records, rows)
    assert result["rows"] == 4 and result["top1"] == 0.5 and result["top3"] == 0.75
    assert result["nll"] == pytest.approx(-np.log(q[np.arange(4), action]).mean())
    true = arrays["policy_probs"][rows, arrays["strategy"][rows]]
    assert result["expected_top1"] == pytest.approx(true[np.arange(4), q.argmax(1)].mean())
    posterior = stag_hunt.history_posterior(data)[rows]
    best = (posterior[:, :, None] * arrays["policy_probs"][rows]).sum(1)

    def expected_nll(p):
        return sum(-w * math.log(p[i, a]) for i in range(4) for a, w in enumerate(true[i].tolist()) if w > 0) / 4

    assert result["regret"] == pytest.approx(expected_nll(q) - expected_nll(best)) and result["regret"] > 0.1
    counts = confusion(q, records, rows)
    assert counts.sum() == 4 and all(counts[a, g] > 0 for a, g in zip(action, q.argmax(1), strict=True))
    recalls = [np.mean(q.argmax(1)[action == a] == a) for a in np.unique(action)]
    assert result["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    gaps = {}
    for sure, hit in zip(q.max(1), q.argmax(1) == action, strict=True):
        gaps.setdefault(int(sure * 15), []).append(hit - sure)
    assert result["ece"] == pytest.approx(sum(abs(sum(gap)) for gap in gaps.values()) / 4)


def test_scores_equal_plain_definitions(data):
    records = records_of(data)
    rows = records.rows(0)
    q = np.random.default_rng(0).dirichlet(np.ones(7), len(rows))
    result, action = score(q, records, rows), data.arrays["action"][rows]
    f1 = []
    for a in range(7):
        predicted, real = q.argmax(1) == a, action == a
        precision, recall = (predicted & real).sum() / predicted.sum(), (predicted & real).sum() / real.sum()
        f1.append(2 * precision * recall / (precision + recall))
    assert result["macro_f1"] == pytest.approx(np.mean(f1))
    assert result["top3"] == pytest.approx(np.mean([a in np.argsort(p)[-3:] for a, p in zip(action, q, strict=True)]))


def test_a_linear_probe_finds_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2_000, 6, generator=generator) * torch.tensor([1.0, 5, 0.1, 1, 1, 0]) + 3
    target = ((x - 3) @ torch.randn(6, 4, generator=generator)).argmax(1)
    free = torch.ones(2_000, 1, dtype=torch.bool)
    probe = moa.fit_probe(x[:1_500], target[:1_500], 4, free[:1_500])
    assert (probe(x[1_500:], free[1_500:]).argmax(1) == target[1_500:]).float().mean() > 0.95
    assert torch.allclose(probe(x, free).exp().sum(1), torch.ones(2_000), atol=1e-5)
    mask = torch.zeros(2_000, 4, dtype=torch.bool)
    mask[:, 1] = mask[:, 3] = True
    allowed = torch.where(mask[torch.arange(2_000), target], target, 3)
    assert set(moa.fit_probe(x, allowed, 4, mask)(x, mask).argmax(1).tolist()) <= {1, 3}


# --- learning ---
def test_a_signal_while_videos_are_made_ends_the_run_at_once(reference, tiny, no_pictures, monkeypatch):
    args = {"capture_video": True}
    with monkeypatch.context() as patch:
        patch.setattr(moa, "record_videos", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), pytest.fail("goes on")))
        assert exit_status(tiny(**args)) == 128 + signal.SIGTERM
    made = []
    monkeypatch.setattr(moa, "record_videos", lambda test, *_: made.append(test) or [])
    args = tiny(**args, resume=True)
    assert exit_status(args) == 0 and len(made) == 1
    different = differences(outcome(Path(args.runs_dir) / "run"), reference)
    assert set(different) <= {"checkpoint.pt/arguments"}


def test_videos_that_fail_do_not_undo_the_training(tiny, tmp_path, no_pictures, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no codec")

    monkeypatch.setattr(moa, "record_videos", fail)
    folder = main(tiny(total_timesteps=2, capture_video=True))
    assert "warning: film failed (ValueError: no codec)" in capsys.readouterr().out
    assert (folder / "model.pt").exists() and torch.load(folder / "checkpoint.pt", weights_only=True)["finished"]


def test_records_with_other_names_and_scales(data):
    arrays, meta = dict(data.arrays), {k: v for k, v in data.meta.items() if k != "observation_scale"}
    arrays["strategy"] = np.full_like(arrays["strategy"], -1)
    del arrays["policy_probs"]
    records = Records(arrays, meta | {"channel_names": ["one"], "action_names": ["a"]}, "1", CPU)
    channels, actions = records.sizes.channels, records.sizes.actions
    assert records.channel_names == [f"plane {i}" for i in range(channels)] and records.strategies == []
    assert records.action_names == [str(i) for i in range(actions)] and records.sizes.pixel_scale == 1.0
    bright = {**arrays, "obs": arrays["obs"] * 200}
    assert Records(bright, meta, "1", CPU).sizes.pixel_scale == 255.0
    other = {**arrays, "split": np.roll(arrays["split"], 1)}
    assert Records(other, meta, "1", CPU).fingerprint() != Records(arrays, meta, "1", CPU).fingerprint()


@pytest.mark.parametrize("objective", ["reconstruction", "moa"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_objective_runs_in_every_context(objective, context, tiny, no_pictures):
    folder = main(tiny(objective=objective, context=context, head_input="state+z", total_timesteps=4))
    (row,) = read_table(folder / "eval.csv")
    assert float(row["top1"]) > 0 and math.isnan(float(row["train_policy"])) == (objective == "reconstruction")
    assert math.isnan(float(row["validation_reconstruction"])) == (objective == "moa")


# --- using it elsewhere ---
@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir) -> Path:
    """The folder of a run that was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        blank = Image.new("RGB", (8, 8))
        patch.setattr(Figure, "savefig", lambda self, file, **_: blank.save(file, format="png"))
        return main(Args(**{**TINY, "runs_dir": str(tmp_path_factory.mktemp("reference")), "data_dir": data_dir}))


@pytest.fixture(scope="module")
def reference(finished) -> dict:
    return outcome(finished)


def test_a_saved_model_can_be_used_alone(finished, data_dir):
    model = moa.load_model(finished / "model.pt")
    data = read_records(next(Path(data_dir).glob("4p5b4x4__18__1200__1.npz")))
    records = records_of(data)
    rows = records.rows(2)
    z = model.encode(torch.from_numpy(data.arrays["obs"][rows]))
    assert z.shape == (len(rows), 16)
    torch.nn.Linear(16, 4)(z).sum().backward()  # someone's agent tunes it further
    assert all(float(p.grad.abs().sum()) > 0 for p in model.encoder.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.encoder.parameters()) > 6
    assert z.detach().numpy() == pytest.approx(moa.predict(model, records, rows)["mean"], abs=1e-6)
    assert model.args.rows == 1_200 and model.sizes == records.sizes


def test_the_five_lines_of_the_page_work(finished, tmp_path):
    page = (ROOT / "docs" / "pretrain_vae_moa.md").read_text()
    (code,) = re.findall(r"```python\n(.*?load_model.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    names: dict = {"observation": np.zeros((7, 4, 4), np.uint8)}
    exec(code.replace("runs/NAME", str(finished)), names)
    assert names["z"].shape == (1, 16)


def test_loading_a_model_evaluates_it_again(finished, tiny, no_pictures):
    folder = main(tiny(load=str(finished / "best_model.pt"), total_timesteps=0, run_name="again"))
    best = min(read_table(finished / "eval.csv"), key=lambda row: float(row["validation_loss"]))
    (again,) = read_table(folder / "eval.csv")
    assert again["step"] == "0" and again["train_loss"] == "nan"
    names = [name for name in best if name != "step" and not name.startswith("train_")]
    assert {name: best[name] for name in names} == {name: again[name] for name in names}
    further = main(tiny(load=str(finished / "best_model.pt"), total_timesteps=3, run_name="further"))
    begun = torch.load(finished / "best_model.pt", weights_only=True)
    after = torch.load(further / "model.pt", weights_only=True)
    change = max(float((after["agent"][k] - v).abs().max()) for k, v in begun["agent"].items())
    assert 0 < change < 3e-3  # three small steps away from where it began


# --- resuming ---
def test_another_seed_ends_elsewhere(reference, tiny, no_pictures):
    """Otherwise the equalities below would be empty."""
    other = outcome(main(tiny(seed=2)))
    assert {"eval.csv", "model.pt/agent/encoder.heads.weight"} <= set(differences(reference, other))


def test_the_same_seed_ends_at_the_same_bytes(reference, tiny, no_pictures):
    assert not differences(outcome(main(tiny())), reference)


@pytest.mark.parametrize("changes", [{"eval_episodes": 2}, {"checkpoint_frequency": 7}])
def test_looking_does_not_change_training(changes, reference, tiny, no_pictures):
    other = outcome(main(tiny(**changes)))
    assert not [name for name in differences(reference, other) if name.startswith("model.pt/")]


def kill_self(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_update(number: int, play: Callable[[], None], after=False) -> None:
    """Have `play` called at the `number`-th update from now on."""
    update, calls = MOA.update, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            play()
        result = update(self, *args, **kwargs)
        if len(calls) == number and after:
            play()
        return result

    MOA.update = counted


def at_call(owner, name: str, number: int, when=lambda *_, **__: True, after=False) -> None:
    """Have the `number`-th call of a function, of those that `when` picks, be this process's end."""
    function, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        result = function(*args, **kwargs) if after else None
        calls.extend([1] * bool(when(*args, **kwargs)))
        if len(calls) == number:
            kill_self()
        return result if after else function(*args, **kwargs)

    setattr(owner, name, call)


def to_checkpoint(_, target, *__, **___) -> bool:
    return str(target).endswith("checkpoint.pt")


def is_checkpoint_file(descriptor: int) -> bool:
    return "checkpoint.pt" in str(Path(f"/proc/self/fd/{descriptor}").readlink())


def is_last_model(_, name, __) -> bool:
    return name == "model.pt"


def kill_in_second_save() -> None:
    save, calls = torch.save, []

    def call(content, file, *args, **kwargs):
        calls.extend([1] * ("sums" in content))
        if len(calls) == 2:
            file.write(b"PK\x03\x04 not the whole")
            file.flush()
            kill_self()
        save(content, file, *args, **kwargs)

    torch.save = call


KILLS = {  # name -> what to arm in the process that will be killed, and the step of the checkpoint that is there then
    "in a gradient step": (lambda: at_update(33, kill_self), 30),
    "before the first checkpoint": (lambda: at_update(7, kill_self), None),
    "before anything is written": (lambda: at_call(moa, "write_atomically", 1), None),
    "in an evaluation": (lambda: at_call(moa, "evaluate", 2), 30),
    "while an epoch is written": (lambda: at_call(moa, "write_epoch", 2), 30),
    "after eval.csv was written": (lambda: at_call(moa.Run, "log_evaluation", 2, after=True), 30),
    "in the middle of writing a checkpoint": (kill_in_second_save, 15),
    "before a checkpoint is flushed": (lambda: at_call(os, "fsync", 3, is_checkpoint_file), 20),
    "before a checkpoint is renamed": (lambda: at_call(os, "replace", 3, to_checkpoint), 20),
    "while an epoch's picture is drawn": (lambda: at_call(Figure, "savefig", 2), 30),
    "before model.pt is written": (lambda: at_call(moa.Run, "save_model", 1, is_last_model), 60),
    "before the run is marked as finished": (lambda: at_call(moa.Run, "finish", 1), 60),
}


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_run_ends_as_if_never_killed(where, reference, tiny, tmp_path, no_pictures, capsys):
    arm, checkpoint_step = KILLS[where]
    pid = os.fork()
    if pid == 0:
        try:
            arm()
            exit_status(tiny())
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    path = tmp_path / "run" / "checkpoint.pt"
    assert path.exists() == (checkpoint_step is not None)
    if checkpoint_step is not None:
        assert torch.load(path, weights_only=True)["step"] == checkpoint_step
    assert exit_status(tiny(resume=True)) == 0
    assert not differences(outcome(tmp_path / "run"), reference)
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGTERM, 20), (signal.SIGINT, 37)])
def test_a_stopped_run_ends_as_if_never_stopped(
    number, step, reference, tiny, tmp_path, no_pictures, monkeypatch, capsys
):
    """Also one that had to collect its games first, as each of these."""
    games = functools.partial(tiny, data_dir=str(tmp_path / "games"))
    with monkeypatch.context() as patch:
        patch.setattr(MOA, "update", MOA.update)
        at_update(step, lambda: os.kill(os.getpid(), number))
        assert exit_status(games()) == 128 + number
    assert "--resume" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == step
    assert exit_status(games(resume=True)) == 0
    different = differences(outcome(tmp_path / "run"), reference)
    assert set(different) <= {"checkpoint.pt/arguments"}  # which names the folder


@pytest.mark.parametrize("changes", [{"context": "history", "objective": "moa"}, {"context": "4", "augment": False}])
def test_other_models_resume_exactly_too(changes, tiny, tmp_path, no_pictures, monkeypatch):
    whole = outcome(main(tiny(**changes, run_name="whole")))
    with monkeypatch.context() as patch:
        patch.setattr(MOA, "update", MOA.update)
        at_update(33, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert exit_status(tiny(**changes)) == 143
    assert exit_status(tiny(**changes, resume=True)) == 0
    different = differences(outcome(tmp_path / "run"), whole)
    assert not different


@pytest.fixture
def interrupted(tiny, tmp_path, no_pictures, monkeypatch) -> Path:
    """The checkpoint of a run that was stopped at step 33."""
    with monkeypatch.context() as patch:
        patch.setattr(MOA, "update", MOA.update)
        at_update(33, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert exit_status(tiny()) == 143
    return tmp_path / "run" / "checkpoint.pt"


CHECKPOINT_KEYS = {
    "step", "sums", "dataset", "agent", "optimizer", "torch_rng", "eval_rows", "arguments", "script", "finished",
    "cuda_rng",
}  # fmt: skip
INNER_KEYS = ("agent/encoder.heads.weight", "agent/decoder.layers.0.bias", "optimizer/state", "optimizer/param_groups")


@pytest.mark.parametrize("key", [*sorted(CHECKPOINT_KEYS), *INNER_KEYS])
def test_nothing_can_be_left_out_of_a_checkpoint(key, interrupted, tiny, capsys):
    state = torch.load(interrupted, weights_only=True)
    assert set(state) == CHECKPOINT_KEYS
    name, _, inner = key.partition("/")
    del (state[name] if inner else state)[inner or name]
    torch.save(state, interrupted)
    capsys.readouterr()
    assert exit_status(tiny(resume=True)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint.pt is damaged" in line and (inner.startswith(("encoder", "decoder")) or (inner or name) in line)


# --- bad input ---
def refused(capsys, tmp_path, args: Args, *parts: str, status=2) -> str:
    """`main` ends with one line that has these parts, before a run folder is created."""
    capsys.readouterr()
    assert exit_status(args) == status
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and len(line) < 400
    for part in parts:
        assert part in line, line
    return line


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"objective": "mao"}, ["--objective mao", "reconstruction, moa, both", "did you mean moa?"]),
        ({"head_input": "x"}, ["--head-input x"]),
        ({"context": "2"}, ["--context 2", "1, 4, history"]),
        ({"batch_size": 0}, ["--batch-size 0"]),
        ({"learning_rate": -1.0}, ["--learning-rate -1.0"]),
        ({"learning_rate": math.nan}, ["--learning-rate nan"]),
        ({"kl_weight": math.inf}, ["--kl-weight inf"]),
        ({"rows": 0}, ["--rows 0"]),
        ({"rows": 10**13}, ["--rows 10000000000000 need", "GB of memory"]),
        ({"seed": 2**64}, ["--seed 18446744073709551616"]),
        ({"learning_rate": 1e39}, ["--learning-rate 1e+39"]),
        ({"max_cycles": 2**20}, ["--max-cycles 1048576", "32767"]),
        ({"latent_dim": 10**9}, ["--latent-dim 1000000000"]),
        ({"rows": 3}, ["at least 3 are needed"]),
        ({"total_timesteps": 0}, ["--load"]),
        ({"capture_video": True, "env_id": f"{__name__}:TheirEnv", "rows": 60}, ["--capture-video"]),
        ({"resume": True, "run_name": None}, ["--run-name"]),
        ({"env_id": "4p5b8x"}, ["did you mean 4p5b8x8"]),
        ({"env_id": "no_such_module:thing"}, ["no_such_module"]),
        ({"env_id": "json:nothing"}, ["json:nothing", "AttributeError"]),
        ({"env_id": "sisl/multiwalker-v9"}, []),
        ({"dataset": "nowhere.npz"}, ["there is no dataset nowhere.npz"]),
        ({"load": "nowhere.pt"}, ["there is no model nowhere.pt"]),
        ({"load": str(SCRIPT)}, ["is not a model of pretrain_vae_moa.py"]),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changes, parts, tiny, tmp_path, capsys):
    refused(capsys, tmp_path, tiny(**changes), *parts)
    assert not (tmp_path / "run").exists()


def test_bad_datasets_are_refused(tiny, tmp_path, capsys):
    data, path = stag_hunt.collect(400, seed=1), tmp_path / "games.npz"
    save_records(path, data)
    whole = path.read_bytes()
    args = tiny(dataset=str(path))
    path.write_bytes(whole[: len(whole) // 2])
    refused(capsys, tmp_path, args, "truncated or damaged")

    def rewrite(**changes):
        path.write_bytes(whole)
        with np.load(path) as file:
            content = {name: file[name] for name in file.files}
        np.savez(path, **{**content, **changes})

    rewrite(meta=np.array(json.dumps({"format_version": 7})))
    refused(capsys, tmp_path, args, "format version 7")
    rewrite(action=(data.arrays["action"] + 1) % 7)
    refused(capsys, tmp_path, args, "hash")
    rewrite(action=data.arrays["action"].astype(object))
    refused(capsys, tmp_path, args, "never unpickled")
    wrong = np.roll(data.arrays["action_mask"], 1, axis=1)
    count = int((~wrong[np.arange(400), data.arrays["action"]]).sum())
    save_records(path, Record({**data.arrays, "action_mask": wrong}, data.meta))
    refused(capsys, tmp_path, args, f"{count} of 400 actions are forbidden", "wrong columns")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["games.npz"]


def test_too_few_games_are_refused(tiny, tmp_path, capsys):
    refused(capsys, tmp_path, tiny(rows=8, data_dir=str(tmp_path / "new")), "--rows 8 make", "at least 3 are needed")
    assert not (tmp_path / "new").exists()


def test_a_model_of_another_shape_is_refused(finished, tiny, tmp_path, capsys, no_pictures):
    path = str(finished / "model.pt")
    refused(capsys, tmp_path, tiny(load=path, latent_dim=8), "--latent-dim 16", "--latent-dim 8")
    refused(capsys, tmp_path, tiny(load=path, env_id="4p5b8x8"), "observations 7x4x4", "observations 7x8x8")
    own = moa.load_model(path).args.objective
    other = "reconstruction" if own != "reconstruction" else "moa"
    untrained = tiny(load=path, objective=other, total_timesteps=0)
    refused(capsys, tmp_path, untrained, f"trained with --objective {own}")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_and_changed_arguments_are_refused(interrupted, tiny, tmp_path, capsys):
    whole = interrupted.read_bytes()
    refused(capsys, tmp_path, tiny(resume=True, learning_rate=1e-3), "learning_rate was 0.0005, now 0.001")
    refused(capsys, tmp_path, tiny(), "exists", "--resume")
    for keep in (0, 10, len(whole) // 2):
        interrupted.write_bytes(whole[:keep])
        refused(capsys, tmp_path, tiny(resume=True), "checkpoint.pt is damaged")


def test_another_dataset_under_the_same_name_is_refused(tiny, tmp_path, no_pictures, monkeypatch, capsys):
    path = tmp_path / "games.npz"
    save_records(path, stag_hunt.collect(400, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(MOA, "update", MOA.update)
        at_update(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert exit_status(tiny(dataset=str(path))) == 143
    save_records(path, stag_hunt.collect(400, seed=2))
    refused(capsys, tmp_path, tiny(dataset=str(path), resume=True), "another dataset")
    save_records(path, stag_hunt.collect(400, seed=1))
    assert exit_status(tiny(dataset=str(path), resume=True)) == 0


def test_a_loss_that_is_not_finite_ends_the_run(tiny, tmp_path, capsys, no_pictures):
    assert exit_status(tiny(learning_rate=1e20, anneal_lr=False)) == 1
    assert "losses/" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.pt").exists()


# --- others' environments ---
class TheirEnv(pettingzoo.ParallelEnv):
    """Two agents on a small picture; the second leaves first. Masks are in the infos, if at all."""

    metadata: ClassVar = {"name": "theirs_v0"}

    def __init__(
        self, dtype=np.float32, shape=(5, 5, 3), masks=True, start=0, action=None, unequal=False, as_dict=False
    ):
        self.possible_agents, self.agents = ["a", "b"], []
        self.box = Box(0, 255 if dtype == np.uint8 else 9, shape, dtype)
        self.space = Dict({"observation": self.box, "action_mask": Box(0, 1, (3,), np.int8)}) if as_dict else self.box
        self.actions = {agent: action or Discrete(3 + (unequal and agent == "b"), start=start) for agent in "ab"}
        self.masks, self.as_dict = masks, as_dict

    def observation_space(self, agent):
        return self.space

    def action_space(self, agent):
        return self.actions[agent]

    def see(self):
        views = {}
        for agent in self.seen:
            view = np.zeros(self.box.shape, self.box.dtype)
            view.flat[self.t] = self.box.high.flat[0]
            views[agent] = {"observation": view, "action_mask": self.mask()} if self.as_dict else view
        return views

    def mask(self):
        return np.array([1, self.t % 2, 1], np.int8)

    def infos(self):
        return {agent: {"action_mask": self.mask()} if self.masks and not self.as_dict else {} for agent in self.seen}

    def reset(self, seed=None, options=None):
        self.random, self.t = np.random.default_rng(seed), 0
        self.agents = self.seen = ["a", "b"]
        return self.see(), self.infos()

    def step(self, actions):
        assert set(actions) == set(self.agents)
        for agent, action in actions.items():
            k = action - int(self.actions[agent].start)
            assert self.actions[agent].contains(action) and (not (self.masks or self.as_dict) or self.mask()[k])
        self.t, self.seen = self.t + 1, self.agents
        ended = {agent: self.t >= (3 if agent == "b" else 6) for agent in self.agents}
        result = self.see(), dict.fromkeys(self.seen, 0.5), ended, dict.fromkeys(self.seen, False), self.infos()
        self.agents = [agent for agent in self.agents if not ended[agent]]
        return result


def their_turn_based():
    return stag_hunt.env()


def their_dict_env():
    return TheirEnv(as_dict=True, shape=(2, 6, 6))


def their_uint8_env():
    return TheirEnv(np.uint8, start=2)


def their_continuous_env():
    return TheirEnv(action=Box(-1, 1, (2,)))


def their_vector_env():
    return TheirEnv(shape=(5,))


def their_unequal_env():
    return TheirEnv(unequal=True)


@pytest.mark.parametrize("name", ["TheirEnv", "their_dict_env", "their_uint8_env"])
def test_trains_on_others_environments(name, tiny, tmp_path, no_pictures):
    args = tiny(env_id=f"{__name__}:{name}", rows=260, total_timesteps=6, eval_frequency=3)
    folder = main(args)
    rows = read_table(folder / "eval.csv")
    assert len(rows) == 2 and float(rows[-1]["top1"]) > 0 and math.isnan(float(rows[-1]["expected_top1"]))
    data = read_records(next(Path(args.data_dir).glob(f"*{name}__18__260__1.npz")))
    arrays = data.arrays
    assert len(arrays["action"]) == 260 and arrays["obs"].dtype == np.uint8
    assert arrays["obs"].shape[1:] == ((2, 6, 6) if "dict" in name else (3, 5, 5))
    assert arrays["obs"].max() == 255 and data.meta["observation_scale"] == 255
    first = arrays["obs"][arrays["t"] == 0]
    assert (first.reshape(len(first), -1) > 0).sum(1).tolist() == [1] * len(first)
    assert (arrays["action_mask"][:, 1] == (arrays["t"] % 2 == 1)).all()
    b = arrays["agent"] == 1
    assert arrays["t"][b].max() == 2 and arrays["t"][~b].max() == 5
    gone = ~b & (arrays["t"] >= 3)
    assert (arrays["joint_action"][gone, 1] == -1).all() and (arrays["joint_action"][~gone] >= 0).all()
    assert (arrays["terminated"] == (arrays["t"] == np.where(b, 2, 5))).all()
    assert (arrays["prev_actions"][arrays["t"] == 0] == -1).all()
    assert exit_status(tiny(env_id=args.env_id, rows=260, total_timesteps=6, eval_frequency=3, resume=True)) == 0


def test_masks_are_optional(tiny, no_pictures):
    arrays, _ = moa.play_randomly(TheirEnv(masks=False), 50, 18, 1)
    assert arrays["action_mask"].all() and set(arrays["action"].tolist()) == {0, 1, 2}
    assert arrays["t"].max() == 5 and moa.play_randomly(TheirEnv(), 50, 4, 1)[0]["t"].max() == 3


@pytest.mark.parametrize(
    ("shape", "order"),
    [((7, 7, 3), (2, 0, 1)), ((3, 7, 7), (0, 1, 2)), ((7, 4, 4), (0, 1, 2)), ((84, 96, 4), (2, 0, 1)),
     ((3, 84, 96), (0, 1, 2)), ((5, 5, 5), (2, 0, 1))],
)  # fmt: skip
def test_the_axis_of_the_channels_is_found(shape, order):
    view = np.random.default_rng(0).random(shape)
    assert (moa.see(TheirEnv(shape=shape), "a", view, {})[0] == view.transpose(order)).all()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("their_turn_based", "expected a PettingZoo parallel environment"),
        ("their_continuous_env", "expected discrete actions"),
        ("their_vector_env", "image-like"),
        ("their_unequal_env", "expected agents of one kind"),
    ],
)
def test_environments_that_do_not_fit_are_refused(name, part, tiny, tmp_path, capsys):
    refused(capsys, tmp_path, tiny(env_id=f"{__name__}:{name}"), part)
    assert not (tmp_path / "run").exists()


class Odd(TheirEnv):
    """TheirEnv with one oddity, by its name."""

    def __init__(self, oddity):
        super().__init__(dtype=np.float32, as_dict=oddity == "mask in both", masks="mask" in oddity)
        self.oddity = oddity
        if oddity in ("unbounded", "huge bounds", "one big cell, no bounds"):
            self.box = self.space = Box(*((-1e10, 1e10) if "huge" in oddity else (-np.inf, np.inf)), (5, 5, 3))
        if oddity == "differing start":
            self.actions["b"] = Discrete(3, start=1)
        if oddity == "no player":
            self.possible_agents = []

    def see(self):
        views = super().see()
        for agent, view in views.items():
            if "bounds" in self.oddity or self.oddity == "unbounded":
                view[view > 9] = 9
            if self.oddity in ("nan", "inf") and self.t == 2:
                view[0, 0, 0] = float(self.oddity)
            if "one big cell" in self.oddity:
                view[...] = np.linspace(0, 9, 75).reshape(5, 5, 3)
                view[0, 0, 0] = 1e9 if self.t == 2 else 4.5
            if self.oddity == "list":
                views[agent] = view.tolist()
            if self.oddity == "wrong shape":
                views[agent] = view[None]
        if self.oddity == "no last view":
            views = {agent: view for agent, view in views.items() if agent in self.still_there()}
        return views

    def still_there(self):
        return [agent for agent in self.seen if not self.t >= (3 if agent == "b" else 6)]

    def infos(self):
        if self.oddity == "no infos":
            return {}
        if self.oddity in ("mask in info", "mask in both"):
            return {agent: {"action_mask": np.array([1, 1, 0], np.int8)} for agent in self.seen}
        if self.oddity == "longer mask":
            return {agent: {"action_mask": np.ones(4, np.int8)} for agent in self.seen}
        if self.oddity == "no legal action":
            return {agent: {"action_mask": np.zeros(3, np.int8)} for agent in self.seen}
        return super().infos()

    def mask(self):
        return np.array([1, 1, 1]) if self.oddity == "mask in info" else super().mask()

    def reset(self, seed=None, options=None):
        result = super().reset(seed)
        if self.oddity == "no player after reset":
            self.agents = []
        return result

    def step(self, actions):
        views, rewards, ended, cut, infos = super().step(actions)
        if self.oddity == "reward of an array":
            rewards = {agent: np.array([reward]) for agent, reward in rewards.items()}
        if self.oddity == "two rewards":
            rewards = {agent: np.array([reward, reward]) for agent, reward in rewards.items()}
        if self.oddity == "nan reward":
            rewards["a"] = math.nan
        if self.oddity == "crash" and self.t == 4:
            raise RuntimeError("boom")
        return (views, rewards, ended, infos) if self.oddity == "four values" else (views, rewards, ended, cut, infos)


@pytest.fixture
def odd(tiny, monkeypatch) -> Callable[..., Args]:
    def make(oddity, **changes):
        monkeypatch.setattr(sys.modules[__name__], "odd_game", lambda: Odd(oddity), raising=False)
        return tiny(env_id=f"{__name__}:odd_game", **{"rows": 100, **changes})

    return make


@pytest.mark.parametrize(
    ("oddity", "part"),
    [
        ("nan", "a sees nan or inf"), ("inf", "a sees nan or inf"), ("wrong shape", "a sees shape (1, 5, 5, 3)"),
        ("differing start", "3 actions from 0 on; views (5, 5, 3), 3 actions from 1 on"),
        ("longer mask", "a has 3 actions, but a mask of shape (4,)"), ("no legal action", "a has no legal action"),
        ("no player", "has no player"), ("no player after reset", "no player at the start of game 0"),
        ("one big cell, no bounds", "give its observation space the bounds"), ("nan reward", "not finite"),
        ("two rewards", "size 1"), ("four values", "expected 5, got 4"), ("crash", "RuntimeError: boom"),
    ],
)  # fmt: skip
def test_games_that_cannot_be_recorded_are_one_line_that_names_them(oddity, part, odd, tmp_path, capsys):
    args = odd(oddity, data_dir=str(tmp_path / "new"))
    refused(capsys, tmp_path, args, part, f"{__name__}:odd_game")
    assert not (tmp_path / "run").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "oddity",
    ["mask in info", "mask in both", "no infos", "no last view", "list", "reward of an array", "unbounded",
     "huge bounds", "one big cell"],
)  # fmt: skip
def test_games_that_are_only_odd_are_recorded_as_they_are(oddity, odd, tmp_path, capfd):
    arrays, meta = moa.open_dataset(odd(oddity, data_dir=str(tmp_path)))
    plain, _ = moa.play_randomly(TheirEnv(masks=False), 100, 18, 1)
    if "mask" in oddity:
        assert not arrays["action_mask"][:, 2].any() and set(arrays["action"].tolist()) == {0, 1}
        odd_step = arrays["t"] % 2 == 1
        assert arrays["action_mask"][:, 1].tolist() == (odd_step | (oddity == "mask in info")).tolist()
    elif "big cell" in oddity:  # the others keep their shades, and the user is told
        shades = np.rint(np.linspace(0, 255, 75).reshape(5, 5, 3)).transpose(2, 0, 1)
        shades[0, 0, 0] = arrays["obs"][0, 0, 0, 0]
        assert (arrays["obs"][arrays["t"] != 2] == shades).all()
        assert set(arrays["obs"][:, 0, 0, 0].tolist()) == {128, 255}
        assert "are cut off at 0 and 9" in capfd.readouterr().err
    else:
        assert all((arrays[name] == plain[name]).all() for name in arrays if name not in ("episode_seed",))
    assert meta["observation_range"] == [0.0, 9.0] and meta["observation_scale"] == 255


def test_who_has_left_keeps_its_last_view(odd, tmp_path):
    args = odd("no last view", data_dir=str(tmp_path))
    moa.open_dataset(args)
    arrays = read_records(next(tmp_path.glob("*.npz"))).arrays
    last = (arrays["agent"] == 1) & (arrays["t"] == 2)
    assert arrays["terminated"][last].all() and (arrays["obs"][last] == arrays["next_obs"][last]).all()
    others = ~arrays["terminated"]
    assert (arrays["obs"][others] != arrays["next_obs"][others]).any((1, 2, 3)).all()


def larger(self) -> None:
    TheirEnv.__init__(self, shape=(6, 6, 3), masks=False)
    self.oddity = "list"


def test_a_game_that_has_changed_does_not_get_the_old_file(odd, tiny, tmp_path, monkeypatch, capsys):
    args = odd("list", data_dir=str(tmp_path))
    first, _ = moa.open_dataset(args)
    (path,) = tmp_path.glob("*.npz")
    assert f"kept in {path}" in capsys.readouterr().out
    again, _ = moa.open_dataset(args)
    assert (again["obs"] == first["obs"]).all() and f"{path}; remove it to have them" in capsys.readouterr().out
    for change in (
        {"mask": lambda self: np.array([1, 1, 1])},  # its code
        {"see": lambda self: {agent: np.zeros((5, 5, 3)) for agent in self.seen}},
        {"__init__": lambda self, oddity: larger(self)},
    ):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(Odd, name, value)
            if "mask" in change:
                patch.setattr(Odd, "infos", lambda self: {a: {"action_mask": np.array([1, 0, 1])} for a in self.seen})
            with pytest.raises(ValueError, match="does not play now; remove the file to have them played") as error:
                moa.open_dataset(args)
            assert str(path) in str(error.value)
    hunt = tiny(data_dir=str(tmp_path), rows=300)
    moa.open_dataset(hunt)
    monkeypatch.setattr(stag_hunt.VectorStagHunt, "sample", lambda self, p: np.full(p.shape[:2], stag_hunt.STAY))
    with pytest.raises(ValueError, match="remove the file"):
        moa.open_dataset(hunt)


def test_a_game_without_a_seed_keeps_its_file(odd, tmp_path, monkeypatch):
    def see(self):
        return {agent: np.random.default_rng().random((5, 5, 3)).astype(np.float32) for agent in self.seen}

    monkeypatch.setattr(Odd, "see", see)
    first, again = (moa.open_dataset(odd("plain", data_dir=str(tmp_path)))[0] for _ in range(2))
    assert (first["obs"] == again["obs"]).all()


def test_ctrl_c_while_games_are_collected_is_one_line(odd, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(moa, "play_randomly", stop)
    with pytest.raises(KeyboardInterrupt):  # which ends the process with status 130
        main(odd("list", data_dir=str(tmp_path / "new")))
    (line,) = capsys.readouterr().err.splitlines()
    assert "stopped while games were collected" in line and not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written_to_are_one_line(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, tmp_path, tiny(data_dir=str(tmp_path / "file")), "cannot use", "choose another folder")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(stag_hunt, "collect", lambda *_, **__: pytest.fail("played in vain"))
    refused(capsys, tmp_path, tiny(data_dir=str(tmp_path / "locked")), "cannot be written to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_model_with_nan_weights_is_refused(finished, tiny, tmp_path, capsys):
    content = torch.load(finished / "model.pt", weights_only=True)
    content["agent"]["encoder.heads.bias"][3] = math.nan
    torch.save(content, tmp_path / "nan.pt")
    refused(capsys, tmp_path, tiny(load=str(tmp_path / "nan.pt")), "weights that are not finite")


def test_pursuit(tiny, no_pictures):
    folder = main(tiny(env_id="sisl/pursuit-v5", rows=700, max_cycles=9, total_timesteps=4, eval_frequency=4))
    (row,) = read_table(folder / "eval.csv")
    assert 0 < float(row["top1"]) < 0.6  # random actions: there is nothing to predict


# --- the command line ---
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
    "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true",
}  # fmt: skip
SMALL = [
    "--env", "4p5b4x4", "--rows", "1200", "--total-timesteps", "60", "--eval-frequency", "20", "--eval-episodes", "6",
    "--batch-size", "16", "--no-cuda",
]  # fmt: skip


def command(*flags: str, script=SCRIPT, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(script), *flags], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def test_everything_that_a_run_leaves_behind(tmp_path):
    result = command("--run-name", "full", "--track", "--capture-video", *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "runs"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["4p5b4x4__18__1200__1.npz"]
    folder = tmp_path / "runs" / "full"
    lines = re.findall(r"^\[MOA\] epoch (\d): top1=0\.\d+, top3=\d\.\d+, balanced accuracy=.*$", result.stdout, re.M)
    assert lines == ["1", "2", "3"]
    assert "python benchmark/moa.py report runs/full" in result.stdout.splitlines()[-1]
    for epoch in (1, 2, 3):
        rows = read_table(folder / f"moa_eval_epoch{epoch}.csv")
        assert [row["subset"] for row in rows] == ["all", "NS", "NH"] and "recall hunt hare" in rows[0]
        with np.load(folder / f"moa_eval_epoch{epoch}.npz") as file:
            assert file["q"].shape == (int(float(rows[0]["rows"])), 7) and file["mean"].shape[1] == 16
            assert file["confusion"].sum() == len(file["q"]) and np.allclose(file["q"].sum(1), 1, atol=1e-5)
            assert float(rows[0]["top1"]) == pytest.approx((file["q"].argmax(1) == file["action"]).mean())
    about = json.loads((folder / "args.json").read_text())
    assert about["packages"]["pettingzoo"] and (folder / "pretrain_vae_moa.py").read_bytes() == SCRIPT.read_bytes()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert {"eval/top1", "losses/policy", "losses/reconstruction", "charts/SPS"} <= set(events.Tags()["scalars"])
    pixels = np.asarray(Image.open(folder / "vae_loss_curve.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 150
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20 and (pixels < 250).any(2).mean() > 0.02
    assert "images/vae_loss_curve" in events.Tags()["images"]
    videos = list((folder / "videos").glob("*.mp4"))
    assert len(videos) == 3 and all(b"ftyp" in path.read_bytes()[:16] for path in videos)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    again = command("--run-name", "full", "--track", "--capture-video", "--resume", *SMALL, cwd=tmp_path)
    assert again.returncode == 0 and "finished" in again.stdout


@pytest.mark.parametrize(
    ("flags", "part"),
    [("--objective moo", "--objective moo"), ("--env 4p5b9x9", "did you mean"), ("--dataset no.npz", "no.npz")],
)
def test_bad_input_through_the_command_line(flags, part, tmp_path):
    result = command("--runs-dir", str(tmp_path / "runs"), *flags.split())
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and part in result.stderr
    assert not result.stdout and not (tmp_path / "runs").exists()


def test_a_copy_alone_trains_on_a_third_partys_environment(tmp_path):
    here = tmp_path / "it's mine"
    here.mkdir()
    source = Path(__file__).read_text()
    body = source[source.index("class TheirEnv") : source.index("def their_turn_based")]
    header = "from typing import ClassVar\nimport numpy as np\nimport pettingzoo\nfrom gymnasium.spaces import *\n\n"
    (here / "theirs.py").write_text(header + body)
    (here / "pretrain_vae_moa.py").write_bytes(SCRIPT.read_bytes())
    flags = ["--env", "theirs:TheirEnv", *SMALL[2:]]
    result = command(*flags, script="pretrain_vae_moa.py", cwd=here)
    assert result.returncode == 0, result.stderr
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("theirs-TheirEnv__pretrain_vae_moa__1__")
    assert len(read_table(folder / "eval.csv")) == 3
    alone = command("--dataset", "x.npz", script="pretrain_vae_moa.py", cwd=here)
    assert alone.returncode == 2 and "envs" in alone.stderr


def test_importing_the_script_draws_nothing_and_opens_nothing(tmp_path):
    code = (
        "import sys, random, numpy, torch\n"
        "before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()\n"
        "import pretrain_vae_moa\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()\n"
        "assert before[1] == numpy.random.get_state()[1].tolist()\n"
        "assert not {'wandb', 'matplotlib.pyplot', 'moviepy', 'pygame', 'scipy'} & set(sys.modules), 'slow import'\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
