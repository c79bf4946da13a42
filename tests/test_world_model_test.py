"""world_model_test.py: its measures on hand-made frames, its losses, learning, resuming, and bad input."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "world_model_test.py"
sys.path.insert(0, str(ROOT))

import world_model_test as wm  # noqa: E402
from envs import records, stag_hunt  # noqa: E402
from world_model_test import Args, Game, Transitions, WorldModel, places, to_transitions, violations  # noqa: E402

torch.set_num_threads(1)
REWARDS = [0.0, 0.25, 1 / 3, 0.5, 1.0, 2.5, 10 / 3, 5.0]
PAYS = {"nothing": 0.0, **stag_hunt.Config().payments}
GAME = Game(4, 8, 8, 7, REWARDS, True, PAYS)
SMALL = {
    "rows": 1_000, "test_rows": 1_000, "total_timesteps": 40, "eval_frequency": 20, "checkpoint_frequency": 10,
    "hidden_dim": 8, "batch_size": 32, "open_loop_steps": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    """Games are cached in the current folder."""
    monkeypatch.chdir(tmp_path)


def games(rows=2_000, seed=5, **changes) -> Transitions:
    config = stag_hunt.Config(**{**stag_hunt.PRESETS["4p5b8x8"], **changes})
    record = stag_hunt.collect(rows, config, 35, ("NS", "NH", "random"), seed)
    return to_transitions(record.arrays, "games")


@pytest.fixture(scope="module")
def data() -> Transitions:
    return games()


def learner(seed=0, game=GAME, **changes) -> WorldModel:
    torch.manual_seed(seed)
    return WorldModel(game, Args(**{**SMALL, **changes}))


# --- rules ---
def frame(players=(0, 9, 18, 27), obstacles=(), stags=(45,), hares=(3, 12, 60, 63)) -> torch.Tensor:
    """A frame (7, 8, 8) with entities at these cells; None or 64: gone; a tuple: in several cells."""
    result = torch.zeros(7, 65, dtype=torch.uint8)
    for channel, where in enumerate([*players, obstacles, stags, hares]):
        for cell in where if isinstance(where, tuple) else (64 if where is None else where,):
            result[channel, cell] = 1
    return result[:, :-1].reshape(7, 8, 8)


STAY = (4, 4, 4, 4)
LAWFUL = {  # name -> before, joint action, after, rewards
    "stay": ({}, STAY, {}, (0, 0, 0, 0)),
    "move": ({}, (1, 4, 4, 4), {"players": (8, 9, 18, 27)}, (0, 0, 0, 0)),
    "hare alone": (
        {"players": (3, 9, 18, 27)}, (6, 4, 4, 4), {"players": (None, 9, 18, 27), "hares": (12, 60, 63)}, (1, 0, 0, 0)
    ),
    "stag by two": (
        {"players": (45, 45, 18, 27)}, (5, 5, 4, 4), {"players": (None, None, 18, 27), "stags": ()}, (5, 5, 0, 0)
    ),
    "gone stays gone": ({"players": (0, None, 18, 27)}, (4, -1, 4, 4), {"players": (0, None, 18, 27)}, (0, 0, 0, 0)),
}  # fmt: skip
BROKEN = {
    "duplicated": [({}, STAY, {"players": ((0, 1), 9, 18, 27)}, (0, 0, 0, 0))],
    "jumped": [
        ({}, (3, 4, 4, 4), {"players": (2, 9, 18, 27)}, (0, 0, 0, 0)),
        ({}, (3, 4, 4, 4), {"players": (9, 9, 18, 27)}, (0, 0, 0, 0)),  # a corner is two cells away
        ({"players": (7, 9, 18, 27)}, (3, 4, 4, 4), {"players": (8, 9, 18, 27)}, (0, 0, 0, 0)),  # over the border
    ],
    "vanished": [
        ({}, STAY, {"players": (None, 9, 18, 27)}, (0, 0, 0, 0)),
        ({}, (6, 4, 4, 4), {"players": (None, 9, 18, 27)}, (0, 0, 0, 0)),  # hunts where no hare is
        ({"players": (45, 45, 18, 27)}, (5, 4, 4, 4), {"players": (None, 45, 18, 27)}, (0, 0, 0, 0)),  # hunts alone
    ],
    "stayed": [
        ({"players": (3, 9, 18, 27)}, (6, 4, 4, 4), {"players": (3, 9, 18, 27), "hares": (12, 60, 63)}, (1, 0, 0, 0))
    ],
    "reappeared": [({"players": (0, None, 18, 27)}, (4, -1, 4, 4), {}, (0, 0, 0, 0))],
    "in an obstacle": [
        ({"obstacles": (1,)}, (3, 4, 4, 4), {"obstacles": (1,), "players": (1, 9, 18, 27)}, (0, 0, 0, 0))
    ],
    "prey": [
        ({}, STAY, {"hares": (3, 12, 60)}, (0, 0, 0, 0)),
        ({}, STAY, {"hares": (3, 12, 60, 62, 63)}, (0, 0, 0, 0)),
        ({}, STAY, {"stags": (46,)}, (0, 0, 0, 0)),
        ({}, STAY, {"stags": ()}, (0, 0, 0, 0)),
        ({"players": (3, 9, 18, 27)}, (6, 4, 4, 4), {"players": (None, 9, 18, 27)}, (1, 0, 0, 0)),  # outlives its hunt
    ],
    "obstacles": [({"obstacles": (5,)}, STAY, {}, (0, 0, 0, 0))],
    "reward": [({}, STAY, {}, (0.042, 0, 0, 0)), ({}, STAY, {}, (10.0, 0, 0, 0))],
}  # fmt: skip


def check(case, **changes) -> set[str]:
    before, actions, after, rewards = case
    args = frame(**before)[None], torch.tensor([actions]), frame(**after)[None], torch.tensor([rewards]).float()
    return {name for name, broken in violations(GAME._replace(**changes), *args).items() if broken.item()}


@pytest.mark.parametrize("case", LAWFUL.values(), ids=LAWFUL)
def test_what_the_game_allows_breaks_no_rule(case):
    assert check(case) == set()


@pytest.mark.parametrize("rule, case", [(rule, case) for rule, cases in BROKEN.items() for case in cases])
def test_each_broken_rule_is_found_and_no_other(rule, case):
    assert check(case) == ({"reward", "any"} if rule == "reward" else {rule, "any in the frame", "any"})
    assert set(BROKEN) == set(wm.RULES)


def test_a_moving_stag_may_move_one_cell():
    broken = {"prey", "any in the frame", "any"}
    for stags, expected in (((46,), set()), ((53,), set()), ((47,), broken), ((54,), broken), ((), broken)):
        assert check(({}, STAY, {"stags": stags}, (0, 0, 0, 0)), stag_moves=True) == expected
    for taken in ({"hares": (3, 12, 60, 46)}, {"obstacles": (46,)}):
        assert check((taken, STAY, {**taken, "stags": (46,)}, (0, 0, 0, 0)), stag_moves=True) == broken


@pytest.mark.parametrize("changes", [{}, {"n_blocks": 2}, {"size": 4}, {"stag_moves": True}, {"n_stags": 2}])
def test_true_transitions_break_no_rule_and_no_mask_forbids_them(changes):
    data = games(3_000, **changes)
    game = wm.find_game(data, data, Args(), stag_hunt.Config(**changes))
    found = violations(game, data.obs, data.actions, data.next_obs, data.rewards)
    assert {name: int(broken.sum()) for name, broken in found.items()} == dict.fromkeys(found, 0)
    assert len(data.obs) == 3_000 and (data.rewards > 0).any() and game.single_stag == (changes.get("n_stags") != 2)
    wm.check_data(Args(), game, data, data)


def test_a_reward_that_training_never_saw_is_lawful_if_the_game_pays_it(data):
    """Four hunters of a stag are rare: a model cannot predict their reward, but the truth breaks no rule."""
    train = data.select((data.rewards < 5.0).all(1).nonzero()[:, 0])
    game = wm.find_game(train, data, Args(), stag_hunt.Config())
    assert 5.0 not in game.reward_values and {0.0, 0.25, 1.0, 2.5, 5.0} < set(game.pays.values())
    assert 10.0 not in game.pays.values()  # nobody catches a stag alone
    assert not violations(game, data.obs, data.actions, data.next_obs, data.rewards)["reward"].any()
    theirs = wm.find_game(train, data, Args(data="theirs.npz"))
    assert not violations(theirs, data.obs, data.actions, data.next_obs, data.rewards)["reward"].any()


# --- measures ---
def test_a_perfect_model_scores_everything_and_a_copy_what_stood_still(data):
    rows = {
        obs.numpy().tobytes() + a.numpy().tobytes(): i
        for i, (obs, a) in enumerate(zip(data.obs, data.actions, strict=True))
    }

    def perfect(obs, actions):
        found = [rows[o.numpy().tobytes() + a.numpy().tobytes()] for o, a in zip(obs, actions, strict=True)]
        return data.next_obs[found], data.rewards[found]

    game = wm.find_game(data, data, Args(), stag_hunt.Config())
    result = wm.measure_frames(game, perfect, data)
    shares = {name: value for name, value in result.items() if name != "events"}
    assert all(value == (0.0 if name.startswith("violation") else 1.0) for name, value in shares.items())
    events = result["events"]
    assert {"hare, 1 hunter", "stag, 2 hunters"} <= set(events) and all(
        event["exact"] == 1.0 for event in events.values()
    )
    assert events["hare, 1 hunter"]["frames"] == int((data.rewards == 1.0).any(1).sum())
    assert set(wm.measure_open_loop(perfect, data, 5).values()) == {1.0}

    copied = wm.measure_frames(game, lambda obs, _: (obs, torch.zeros(len(obs), 4)), data)
    same = float((data.obs == data.next_obs).flatten(1).all(1).float().mean())
    assert copied["exact"] == pytest.approx(same) and 0.0 < same < 0.5 and copied["exact_changed"] == 0.0
    assert copied["reward"] == pytest.approx(float((data.rewards == 0).all(1).float().mean()))
    hunts = float((data.rewards != 0).any(1).float().mean())  # who catches leaves, and so does the prey
    assert copied["reward_event"] == 0.0 and copied["violation any"] == pytest.approx(hunts) and hunts > 0.0


def test_open_loop_sees_its_own_frames_only(data):
    """A model that loses the stag: wrong from the first step on, in each game with a stag."""
    seen = []

    def blind(obs, actions):
        seen.append(int(obs[:, 5].sum()))
        result = obs.clone()
        result[:, 5] = 0
        return result, torch.zeros(len(obs), 4)

    shares = wm.measure_open_loop(blind, data, 4)
    assert list(shares) == [1, 2, 3, 4] and seen[0] > 0 and seen[1:] == [0, 0, 0] and max(shares.values()) < 0.2


def test_roll_outs_follow_one_player_of_one_game(data):
    linked = data.view[1:] == data.view[:-1]
    assert 0.5 < float(linked.float().mean()) < 1.0
    assert torch.equal(data.next_obs[:-1][linked], data.obs[1:][linked])
    assert torch.equal(data.t[:-1][linked] + 1, data.t[1:][linked]) and (data.t[1:][~linked] == 0).all()
    begun = []
    wm.measure_open_loop(lambda obs, _: (begun.append(obs), (obs, None))[1], data, 6)
    lasting = [i for i in range(len(data.obs) - 5) if len(set(data.view[i : i + 6].tolist())) == 1]
    assert torch.equal(begun[0], data.obs[[i for i in lasting if data.t[i] % 6 == 0]])


def test_squared_errors_and_both_definitions_of_psnr(data):
    few = data.select(torch.arange(2))
    error = torch.tensor([0.1, 0.2])[:, None, None, None]
    result = wm.measure_values(lambda obs, _: (few.next_obs.float() + error, few.rewards + 0.5), few)
    assert result["obs_mse"] == pytest.approx(0.025) and result["reward_mse"] == pytest.approx(0.25)
    assert result["psnr_of_mean"] == pytest.approx(-10 * np.log10(0.025), abs=1e-4)
    assert result["mean_of_psnr"] == pytest.approx((20.0 - 10 * np.log10(0.04)) / 2, abs=1e-4)
    assert result["channel_mse"] == pytest.approx([0.025] * 7)


def test_calibration_of_a_model_that_knows_nothing(data):
    """All logits 0, no mask: every place has the share 1 / 65, every cell 1 / 2."""
    ours = learner(mask=False)
    for parameter in (*ours.cell_head.parameters(), *ours.gone_head.parameters()):
        torch.nn.init.zeros_(parameter)
    result = wm.calibration(ours, data)
    assert result["nll"] == pytest.approx(5 * np.log(65) + 2 * 64 * np.log(2), rel=1e-4)
    first = places(data.next_obs, GAME)[:, :4] == 0
    assert result["ece"] == pytest.approx(abs(1 / 65 - float(first.float().mean())), abs=1e-4)


def test_the_limit_is_one_unless_stags_move():
    data, config = games(2_000, stag_moves=True), stag_hunt.Config(stag_moves=True)

    def limit(part: Transitions, config: stag_hunt.Config, draws: int = 100) -> float:
        return config.limit(part.obs.numpy(), part.actions.numpy(), draws)

    assert limit(data, stag_hunt.Config()) == 1.0
    gone = ~data.obs[:, 5].flatten(1).bool().any(1)
    assert limit(data.select(gone.nonzero()[:20, 0]), config, 20) == 1.0  # no stag is left that could move
    inside = data.obs[:, 5, 1:-1, 1:-1].flatten(1).bool().any(1)
    # Five ways, each as likely, but for what stands in the way.
    assert 0.2 < limit(data.select(inside.nonzero()[:, 0]).spread(40), config) < 0.45


def test_ranking_counts_better_matches(data):
    ours = learner(contrastive_coef=1.0)
    similarity = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 3.0], [9.0, 8.0, 7.0]])
    ours.similarity = lambda *_: similarity
    assert wm.ranking(ours, data.select(torch.arange(3))) == {
        "hits_at_1": pytest.approx(1 / 3), "mrr": pytest.approx((1 + 1 / 2 + 1 / 3) / 3), "pool": 3
    }  # fmt: skip


# --- the model ---
def test_places_are_read_off_planes():
    where = places(frame(players=(5, None, 63, 0))[None], GAME)
    assert where.tolist() == [[5, 64, 63, 0, 45]]


def test_a_painted_action_is_at_its_players_cell(data):
    ours = learner()
    seen = []
    ours.trunk = torch.nn.Module()
    ours.trunk.forward = lambda planes: seen.append(planes) or torch.zeros(len(planes), 8, 8, 8)
    ours(frame(players=(5, None, 63, 0))[None], torch.tensor([[2, -1, 6, 4]]))
    painted = seen[0][0, 7:35].view(4, 7, 64)
    assert painted.nonzero().tolist() == [[0, 2, 5], [2, 6, 63], [3, 4, 0]] and (seen[0][0, 35] == 1).all()
    ours.painted = False
    ours(frame(players=(5, None, 63, 0))[None], torch.tensor([[2, -1, 6, 4]]))
    constant = seen[1][0, 7:35].view(4, 7, 64)
    assert constant.mean(2).nonzero().tolist() == [[0, 2], [2, 6], [3, 4]] and constant.unique().tolist() == [0, 1]


def test_who_leaves_is_read_off_the_own_actions_output():
    """The head says 0, 1, ... for the actions and 7 for the stag; who is gone already has no action."""
    ours = learner()
    last = ours.gone_head[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.arange(8.0)
    prediction = ours(frame(players=(5, None, 63, 63))[None], torch.tensor([[2, -1, 6, 4]]))
    assert prediction.entities[0, :, -1].tolist() == [2.0, 0.0, 6.0, 4.0, 7.0]


def test_the_mask_leaves_what_is_reachable():
    reach = learner().reach
    for row in range(8):
        for column in range(8):
            near = {(row + i, column + j) for i, j in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))}
            cells = {r * 8 + c for r, c in near if 0 <= r < 8 and 0 <= c < 8}
            assert set(reach[row * 8 + column].nonzero()[:, 0].tolist()) == cells | {64}
    assert reach[64].nonzero().tolist() == [[64]]


@pytest.mark.parametrize("kind", ["mse", "cell", "entity"])
@pytest.mark.parametrize("contrastive", [0.0, 0.5])
def test_every_part_of_the_model_is_trained(kind, contrastive, data):
    ours = learner(model=kind, contrastive_coef=contrastive)
    before = {name: value.clone() for name, value in ours.named_parameters()}
    batch = data.select((data.rewards > 0).any(1).nonzero()[:64, 0])
    for count in (1, 2):
        losses = ours.update(batch)
        assert {int(state["step"]) for state in ours.optimizer.state.values()} == {count}
    still = {name for name, value in ours.named_parameters() if torch.equal(value, before[name])}
    assert not still and ("contrastive" in losses) == (contrastive > 0.0)
    assert float(losses["total"]) == pytest.approx(
        float(losses["frame"] + losses["reward"]) + contrastive * float(losses.get("contrastive", 0.0)), rel=1e-5
    )


def test_the_reward_moves_no_frame_head_and_the_frame_no_reward_head(data):
    ours = learner()
    losses = ours.losses(data.select(torch.arange(64)))
    for loss, other in (("reward", "cell_head"), ("frame", "reward_head")):
        parameters = list(getattr(ours, other).parameters())
        assert torch.autograd.grad(losses[loss], parameters, retain_graph=True, allow_unused=True) == (None,) * len(
            parameters
        )


def test_the_likelihood_is_the_product_over_entities_and_cells(data):
    ours, one = learner(), data.select(torch.tensor([7]))
    prediction = ours(one.obs, one.actions, one.next_obs)
    shares = prediction.entities.softmax(2)[0]
    after = places(one.next_obs, GAME)[0]
    nll = -sum(float(shares[i, after[i]].detach().log()) for i in range(5))
    for channel in (4, 6):
        p = torch.sigmoid(prediction.planes[0, channel])
        target = one.next_obs[0, channel].float()
        nll -= float((target * p.log() + (1 - target) * (1 - p).log()).sum())
    assert float(ours.losses(one)["frame"]) == pytest.approx(nll, rel=1e-4)


@pytest.mark.parametrize("kind", ["cell", "entity"])
def test_draws_follow_the_shares(kind, data):
    ours, one = learner(model=kind), data.select(torch.zeros(4_000, dtype=torch.long))
    expected, _ = ours.expected(one.obs[:1], one.actions[:1])
    drawn, rewards = ours.predict(one.obs, one.actions, torch.Generator().manual_seed(3))
    assert (drawn.float().mean(0) - expected[0]).abs().max() < 5 * 0.5 / 4_000**0.5
    assert np.isin(rewards.numpy(), np.float32(REWARDS)).all()
    likely, _ = ours.predict(one.obs[:1], one.actions[:1])
    if kind == "cell":
        assert torch.equal(likely[0].bool(), expected[0] > 0.5)


def test_learns_the_game_from_little(data):
    """Copying the frame is right in less than half of the frames."""
    game = wm.find_game(data, data, Args())
    ours = learner(game=game, hidden_dim=32)
    for step in range(400):
        ours.update(data.select(torch.randint(len(data.obs), (128,))), step / 400)
    fresh = games(1_000, seed=77)
    result = wm.measure_frames(game, ours.predict, fresh)
    assert result["exact"] > 0.6 and result["violation any"] < 0.4


@pytest.mark.parametrize("kind, steps", [("mse", 500), ("cell", 1_500), ("entity", 500)])
def test_learns_a_few_transitions_by_heart(kind, steps, data):
    ours, few = learner(model=kind, hidden_dim=32), data.select((data.rewards > 0).any(1).nonzero()[:16, 0])
    for step in range(steps):
        ours.update(few, step / steps)
    result = wm.measure_frames(GAME, ours.predict, few)
    assert result["exact"] == 1.0 and (kind == "mse" or result["reward"] == 1.0)


# --- runs ---
@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take longer than all else in so small a run."""
    monkeypatch.setattr(wm, "draw_transitions", lambda *_: Figure())


def checked(**changes) -> Args:
    args = Args(**{**SMALL, **changes})
    wm.check(args)
    return args


def run(tmp_path, **changes) -> Path:
    return wm.main(Args(**{**SMALL, "runs_dir": str(tmp_path / "runs"), **changes}))


def same(a: Path, b: Path) -> bool:
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True)["agent"] for folder in (a, b))
    texts = [[(folder / name).read_text() for name in ("eval.csv", "metrics.json")] for folder in (a, b)]
    return texts[0] == texts[1] and all(torch.equal(ours[key], theirs[key]) for key in ours)


def stop_at(monkeypatch, step: int, number: int) -> None:
    real, count = WorldModel.update, [0]

    def update(*args):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(WorldModel, "update", update)


@pytest.mark.parametrize(
    "changes", [{}, {"model": "mse", "action_input": "planes"}, {"model": "cell", "contrastive_coef": 0.1}]
)
def test_a_stopped_run_ends_as_if_never_stopped(changes, tmp_path, monkeypatch, no_pictures, capsys):
    whole = run(tmp_path, run_name="whole", **changes)
    with monkeypatch.context() as patch:
        stop_at(patch, 23, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, run_name="stopped", **changes)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert same(whole, run(tmp_path, run_name="stopped", resume=True, **changes))
    printed = capsys.readouterr().out
    assert "Obs MSE:" in printed and "Obs PSNR:" in printed and "Rew MSE:" in printed and "Per-channel MSE:" in printed


def test_a_killed_run_ends_as_if_never_killed(tmp_path, monkeypatch, no_pictures):
    whole = run(tmp_path, run_name="whole")
    child = os.fork()
    if not child:
        stop_at(monkeypatch, 27, signal.SIGKILL)
        run(tmp_path, run_name="killed")
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert same(whole, run(tmp_path, run_name="killed", resume=True))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, monkeypatch, no_pictures, capsys):
    """Cut, with other arguments, or with other data than the run began with."""
    with monkeypatch.context() as patch:
        stop_at(patch, 23, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(tmp_path, run_name="stopped")
    path = tmp_path / "runs" / "stopped" / "checkpoint.pt"
    whole = path.read_bytes()

    def line(**changes) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            run(tmp_path, run_name="stopped", resume=True, **changes)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert error.value.code == 2 and line.startswith("error: ")
        return line

    assert "hidden_dim was 8, now 9" in line(hidden_dim=9)
    path.write_bytes(whole[: len(whole) // 2])
    assert "checkpoint.pt is damaged" in line()
    path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(wm, "collect", lambda args, config, rows, seed: games(rows, seed + 1))
        assert "the data are not those" in line()
    for name in ("agent", "optimizer", "data"):
        state = torch.load(path, weights_only=True)
        del state[name]
        torch.save(state, path)
        assert "checkpoint.pt is damaged" in line()
        path.write_bytes(whole)


def test_a_saved_model_and_a_function_are_tested_alike(tmp_path, request):
    trained = run(tmp_path, run_name="trained")
    for name in ("transitions_worst", "transitions_random"):
        assert (trained / f"{name}.png").stat().st_size > 5_000
    request.getfixturevalue("no_pictures")
    loaded = run(tmp_path, run_name="loaded", load=str(trained / "model.pt"))
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (trained, loaded))
    assert ours["mode"] == theirs["mode"] and ours["open_loop"] == theirs["open_loop"]
    assert not (loaded / "model.pt").exists()
    (tmp_path / "copies.py").write_text(
        "import numpy as np\ndef f(obs, actions):\n    return obs, np.zeros(actions.shape)\n"
    )
    copied = json.loads((run(tmp_path, run_name="copied", load="copies:f") / "metrics.json").read_text())
    assert copied["mode"] == copied["copy"] and copied["values"] == copied["values_copy"]


def save(path: Path, data: Transitions, channels_last=False, **changes) -> str:
    obs, next_obs = (np.moveaxis(v.numpy(), 1, 3) if channels_last else v.numpy() for v in (data.obs, data.next_obs))
    columns = {"obs": obs, "actions": data.actions.numpy(), "rewards": data.rewards.numpy(), "next_obs": next_obs}
    np.savez(path, **{key: value for key, value in {**columns, **changes}.items() if value is not None})
    return str(path)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_plain_file_is_trained_and_tested_on(channels_last, data, tmp_path, no_pictures):
    path = save(tmp_path / "plain.npz", data, channels_last)
    result = json.loads((run(tmp_path, data=path, run_name="plain") / "metrics.json").read_text())
    assert result["rows"] == 400 and result["open_loop"] == {} and result["truth"]["violation any"] == 0.0


def test_a_plain_file_that_names_its_games_is_rolled_out(tmp_path):
    record = stag_hunt.collect(2_000, stag_hunt.Config(), 35, ("NS", "NH", "random"), 5)
    columns = {name: record.arrays[name] for name in ("episode", "agent", "t")}
    path = save(tmp_path / "plain.npz", to_transitions(record.arrays, "games"), **columns)
    train, test, config = wm.find_data(Args(data=path))
    assert config is None
    episodes = np.unique(columns["episode"])
    last = np.isin(columns["episode"], episodes[-(len(episodes) // 5) :])
    for part, rows in ((train, ~last), (test, last)):  # no game is in both
        assert torch.equal(part.obs, torch.from_numpy(record.arrays["obs"][rows]))
    rolled = wm.measure_open_loop(lambda obs, _: (obs, None), test, 5)
    assert list(rolled) == [1, 2, 3, 4, 5]
    order = np.random.default_rng(0).permutation(2_000)  # in any order
    whole = to_transitions(record.arrays, "games").select(torch.from_numpy(order))
    path = save(tmp_path / "mixed.npz", whole, **{name: values[order] for name, values in columns.items()})
    assert torch.equal(wm.find_data(Args(data=path))[1].obs, test.obs)
    for changes, part in (
        ({"episode": np.zeros(2_000, int)}, "has 2000 rows: too few to hold out a fifth of its 1 games"),
        ({"t": columns["t"] + 0.5}, "2000 rows have t that are not whole numbers"),
        ({"agent": columns["agent"][:7]}, r"got obs .*agent \(7,\)"),
    ):
        with pytest.raises(ValueError, match=part):
            wm.find_data(Args(data=save(tmp_path / "bad.npz", whole, **{**columns, **changes})))


def test_rewards_of_any_kind_can_be_tested(tmp_path, no_pictures, data):
    """Thousands of different rewards are no rule, and small ones are not all the same."""
    generator = np.random.default_rng(0)
    path = save(tmp_path / "many.npz", data, rewards=generator.normal(size=data.rewards.shape).astype(np.float32))
    result = json.loads((run(tmp_path, run_name="many", data=path, model="mse") / "metrics.json").read_text())
    assert result["mode"]["violation reward"] == 0.0 and result["mode"]["violation any"] > 0.0
    train, test, _ = wm.find_data(Args(data=save(tmp_path / "small.npz", data, rewards=data.rewards.numpy() / 1_000)))
    game = wm.find_game(train, test, Args(data="small.npz"))
    nothing = wm.measure_frames(game, lambda obs, actions: (obs, torch.zeros(actions.shape)), test)
    assert 0.0 < nothing["reward"] < 1.0 and nothing["reward_event"] == 0.0
    assert GAME.same_reward == 0.02 and game.same_reward < 0.0003


def test_a_record_of_games_is_tested_on_games_of_its_own(tmp_path):
    record = stag_hunt.collect(2_000, stag_hunt.Config(stag_moves=True), 35, ("NS", "NH"), 3)
    records.save_records(tmp_path / "record.npz", record)
    train, test, config = wm.find_data(Args(data=str(tmp_path / "record.npz")))
    assert config == stag_hunt.Config(stag_moves=True) and wm.find_game(train, test, Args(), config).stag_moves
    split = record.arrays["split"][record.arrays["episode"]]
    assert len(test.obs) == int((split == 2).sum()) and len(train.obs) == int((split != 2).sum())
    assert torch.equal(test.obs, torch.from_numpy(record.arrays["obs"][split == 2]))


# --- bad input ---
def refused(capsys, tmp_path, **changes) -> str:
    with pytest.raises(SystemExit) as error:
        run(tmp_path, **changes)
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert not (tmp_path / "runs").exists()
    return lines[0]


BAD_DATA = {
    "no next": ({"next_obs": None}, "has no next_obs"),
    "two selves": ({"obs": "twice"}, "a player's plane with two ones"),
    "grey": ({"obs": "grey"}, "1 rows have obs that are not 0 or 1"),
    "nan": ({"rewards": "nan"}, "1 rows have rewards that are not finite"),
    "planes": ({"obs": "fewer", "next_obs": "fewer"}, "(N, n + 3, H, W), actions and rewards (N, n), got obs"),
    "unequal": ({"obs": "few", "next_obs": "few"}, "got obs (3, 7, 8, 8), actions (2000, 4)"),
    "objects": ({"actions": "objects"}, "Python objects"),
    "no rows": ({"obs": "none", "actions": "none", "rewards": "none", "next_obs": "none"}, "has 0 rows: too few"),
    "few rows": (
        {"obs": "few", "actions": "few", "rewards": "few", "next_obs": "few"},
        "has 3 rows: too few to hold out",
    ),
    "teleport": ({"next_obs": "teleport"}, "add --no-mask"),
    "words": ({"actions": "words"}, "expected numbers in actions"),
    "halves": ({"actions": "halves"}, "1 rows have actions that are not whole numbers from -1"),
    "negative": ({"actions": "negative"}, "1 rows have actions that are not whole numbers from -1"),
}


@pytest.mark.parametrize("changes, part", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_refused_with_a_line(changes, part, data, tmp_path, capsys):
    def spoiled(values: np.ndarray, how: str) -> np.ndarray:
        values = values.copy()
        if how == "twice":
            values[3, 0].flat[:2] = 1
        elif how == "grey":
            values[3, 0, 0, 0] = 7
        elif how == "nan":
            values[3, 0] = np.nan
        elif how in ("halves", "negative"):
            values = values.astype(float)
            values[3, 0] = {"halves": 0.5, "negative": -2}[how]
        elif how == "fewer":
            values = values[:, 1:]
        elif how == "words":
            values = values.astype(str)
        elif how == "objects":
            values = values.astype(object)
        elif how in ("none", "few"):
            values = values[: 0 if how == "none" else 3]
        elif how == "teleport":
            values[3, 0] = 0
            values[3, 0].flat[0 if data.obs[3, 0].flatten()[40:].any() else 63] = 1
        return values

    changed = (
        {key: how and spoiled(getattr(data, key).numpy(), how) for key, how in changes.items()}
        if "next_obs" not in changes or changes["next_obs"]
        else {"next_obs": None}
    )
    assert part in refused(capsys, tmp_path, data=save(tmp_path / "bad.npz", data, **changed))


def test_other_files_are_refused_with_a_line(data, tmp_path, capsys):
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"obs": 1}))
    (tmp_path / "table.npz").write_text("obs, actions\n1, 2\n")
    (tmp_path / "hdf5.npz").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (tmp_path / "folder.npz").mkdir()
    np.save(tmp_path / "single.npy", np.zeros(3))
    path = save(tmp_path / "cut.npz", data)
    Path(path).write_bytes(Path(path).read_bytes()[:2_000])
    for name in (
        "pickle.npz",
        "table.npz",
        "hdf5.npz",
        "folder.npz",
        "single.npy",
        "cut.npz",
        "nowhere.npz",
        "n" * 300,
    ):
        line = refused(capsys, tmp_path, data=str(tmp_path / name))
        assert name in line and "convert it to npz" in line
        assert "allow_pickle" not in line and "Python objects" not in line  # nor is anybody told to load it unsafely


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"max_cycles": -3}, "max_cycles is -3; expected a whole number of at least 1"),
        ({"size": "eight"}, "its meta names an impossible game"),
        ({"n_hares": -1}, "its meta names an impossible game"),
    ],
)
def test_a_records_impossible_game_is_refused(changes, part, tmp_path, capsys):
    record = stag_hunt.collect(400, seed=1)
    kwargs = {**record.meta["env_kwargs"], **changes}
    records.save_records(
        tmp_path / "one.npz", record._replace(meta={**record.meta, "env_kwargs": record.meta["env_kwargs"]})
    )
    with np.load(tmp_path / "one.npz") as file:
        columns = dict(file)
    meta = {**json.loads(str(columns["meta"])), "env_kwargs": kwargs}
    np.savez(tmp_path / "one.npz", **{**columns, "meta": np.array(json.dumps(meta))})
    assert part in refused(capsys, tmp_path, data=str(tmp_path / "one.npz"))


def test_kept_games_that_are_not_those_of_their_name_are_refused(tmp_path, capsys, no_pictures):
    run(tmp_path, run_name="one")
    (path,) = Path("data").glob("*_limit35_1000_seed1.npz")
    assert path.name == "markov_stag_hunt_4p5b8x8_limit35_1000_seed1.npz"  # as it always was
    records.save_records(path, stag_hunt.collect(1_000, stag_hunt.Config(n_hares=3), 35, ("NS", "NH", "random"), 1))
    with pytest.raises(SystemExit) as error:
        run(tmp_path, run_name="two")
    assert (
        error.value.code == 2
        and "holds games that markov_stag_hunt-v0 does not play now; remove the file" in capsys.readouterr().err
    )


def test_numbers_are_checked_as_what_they_become(data, tmp_path, capsys):
    rewards = data.rewards.numpy().astype(float)
    rewards[3, 1] = 1e39  # infinite in 32 bits
    path = save(tmp_path / "large.npz", data, rewards=rewards)
    assert "1 rows have rewards that are not finite" in refused(capsys, tmp_path, data=path)
    assert "--learning-rate 1e+39: expected a number of at most" in refused(capsys, tmp_path, learning_rate=1e39)
    with pytest.raises(SystemExit) as error:  # it fits, but its square does not
        run(tmp_path, run_name="one", learning_rate=1e38, total_timesteps=1, model="mse")
    assert error.value.code == 1 and "error: step 1: the predictions are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{"rows": 10**13}, {"batch_size": 10**10}, {"hidden_dim": 10**8}, {"num_layers": 10**9}]
)
def test_sizes_that_no_memory_holds_are_refused(changes, tmp_path, capsys):
    line = refused(capsys, tmp_path, **changes)
    assert "GiB of memory are needed" in line and not Path("data").exists()


FUNCTIONS = {
    "shape": ("obs[:, :3], actions * 0.0", "next_obs of shape (1000, 3, 8, 8), expected (1000, 7, 8, 8)"),
    "rewards": ("obs, actions[:, 0] * 0.0", "rewards of shape (1000,), expected (1000, 4)"),
    "nan": ("obs * np.nan, actions * 0.0", "next_obs with 448000 values that are not finite"),
    "nan without a stag": (
        "obs, obs[:, 5].any((1, 2))[:, None] / obs[:, 5].any((1, 2))[:, None] * actions",
        "not finite",
    ),
    "raises": ("1 / 0", "failed (ZeroDivisionError"),
}


@pytest.mark.parametrize("returned, part", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_that_does_not_fit_is_refused(returned, part, tmp_path, capsys):
    (tmp_path / "theirs.py").write_text(f"import numpy as np\ndef f(obs, actions):\n    return {returned}\n")
    sys.modules.pop("theirs", None)
    assert part in refused(capsys, tmp_path, load="theirs:f")
    sys.modules.pop("theirs", None)


def test_a_model_is_tested_on_another_board(tmp_path, no_pictures):
    """The weights do not know the board's size: exact frames are the same, whatever it was trained on."""
    small = run(tmp_path, run_name="small", env_id="4p5b4x4", total_timesteps=300, batch_size=64)
    changes = {"size": 10, "n_hares": 6, "n_blocks": 1}
    result = json.loads(
        (run(tmp_path, run_name="large", load=str(small / "model.pt"), **changes) / "metrics.json").read_text()
    )
    assert result["rows"] == 1_000 and result["truth"]["violation any"] == 0.0
    assert result["mode"]["exact_players"] > 0.3 and result["mode"]["violation jumped"] == 0.0
    assert result["copy"]["exact_players"] < 0.3
    # By hand: the same weights in a model that was made for that board.
    train, test, config = wm.find_data(checked(**changes))
    game = wm.find_game(train, test, Args(), config)
    assert (game.height, game.width) == (10, 10) and (test.obs[:, 6].sum((1, 2)) <= 6).all() and test.obs[:, 4].any()
    own, held_out, own_config = wm.find_data(checked(env_id="4p5b4x4"))
    as_trained = wm.find_game(own, held_out, Args(), own_config)._replace(height=10, width=10)
    model = wm.WorldModel(as_trained, Args(**SMALL))
    model.load_state_dict(torch.load(small / "model.pt", weights_only=True)["agent"])
    assert wm.evaluate(model.eval(), test, game)["exact"] == result["mode"]["exact"]


def test_a_contrastive_model_leaves_its_projections_behind(tmp_path, no_pictures):
    small = run(tmp_path, run_name="small", env_id="4p5b4x4", contrastive_coef=0.1)
    assert "ranking" in json.loads((small / "metrics.json").read_text())
    same_board = run(tmp_path, run_name="same", env_id="4p5b4x4", load=str(small / "model.pt"))
    large = run(tmp_path, run_name="large", load=str(small / "model.pt"))
    assert "ranking" in json.loads((same_board / "metrics.json").read_text())
    assert "ranking" not in json.loads((large / "metrics.json").read_text())


def test_models_that_do_not_fit_are_refused(tmp_path, no_pictures, capsys):
    single = run(tmp_path, run_name="single")
    with pytest.raises(SystemExit) as error:
        run(tmp_path, load=str(single / "model.pt"), env_id="4p6b8x8")
    line = capsys.readouterr().err.strip()
    assert error.value.code == 2 and "one stag; the data" in line and "several stags" in line
    (tmp_path / "no.pt").write_bytes(b"no model")
    content = torch.load(single / "model.pt", weights_only=True)
    content["agent"]["trunk.0.bias"][3] = float("nan")
    torch.save(content, tmp_path / "nan.pt")
    del content["agent"]["trunk.0.bias"]
    torch.save(content, tmp_path / "less.pt")
    fewer = GAME._replace(players=3)
    torch.save(
        {**content, "agent": learner(game=fewer).state_dict(), "game": json.dumps(fewer._asdict())},
        tmp_path / "three.pt",
    )
    for name, part in (
        ("no.pt", "is not a model"), ("less.pt", "is not a model"), ("nothing:f", "cannot be imported"),
        ("nan.pt", "nan.pt has weights that are not finite: trunk.0.bias"), ("nowhere.pt", "No such file"),
        ("three.pt", "is a model of 3 players with 7 actions; the data have 4 and 7"),
        ("n" * 300 + ".pt", "File name too long"), ("n" * 300 + ":f", "File name too long"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as error:
            run(tmp_path, load=name if ":" in name else str(tmp_path / name))
        assert error.value.code == 2 and part in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"learning_rate": float("inf")}, {"learning_rate": 0.0}, {"rows": -1}]
)
def test_bad_values_are_refused(changes, tmp_path, capsys):
    (name,) = changes
    assert f"--{name.replace('_', '-')}" in refused(capsys, tmp_path, **changes)


def test_what_this_script_cannot_do_is_refused(data, tmp_path, capsys):
    path = save(tmp_path / "plain.npz", data)
    assert "--capture-video needs roll-outs" in refused(capsys, tmp_path, data=path, capture_video=True)
    for changes in ({"stag_moves": True}, {"size": 9}, {"n_hares": 0}):
        assert "for games that are collected here" in refused(capsys, tmp_path, data=path, **changes)
    assert "no room for all prey" in refused(capsys, tmp_path, size=2)


def test_an_evaluation_plays_so_many_games(data, tmp_path, monkeypatch, no_pictures):
    few, names = data.games(3), data.episode.unique()
    assert few.episode.unique().tolist() == [int(names[0]), int(names[(len(names) - 1) // 2]), int(names[-1])]
    assert len(few.obs) == int(torch.isin(data.episode, few.episode.unique()).sum())  # whole ones
    assert len(data.games(10**6).obs) == len(data.obs)
    seen, real = [], wm.evaluate
    monkeypatch.setattr(wm, "evaluate", lambda model, part, game: seen.append(part) or real(model, part, game))
    run(tmp_path, eval_episodes=2)
    assert len(seen) == 2 and all(len(part.episode.unique()) == 2 for part in seen)


def test_a_roll_out_is_filmed_beside_the_truth(tmp_path):
    folder = run(tmp_path, run_name="filmed", capture_video=True)
    videos = sorted((folder / "videos").glob("*.mp4"))
    assert [path.name for path in videos] == [f"open_loop_{i}.mp4" for i in range(3)]
    assert all(path.stat().st_size > 5_000 for path in videos)


def test_a_film_sees_its_own_frames_only(data, tmp_path, monkeypatch):
    drawn, written = [], []
    clip = types.SimpleNamespace(write_videofile=lambda *_, **__: None)
    monkeypatch.setitem(
        sys.modules, "moviepy", types.SimpleNamespace(ImageSequenceClip=lambda f, fps: written.append(f) or clip)
    )
    monkeypatch.setattr(
        wm, "draw_transitions", lambda game, step, frame, rewards: drawn.append((step, frame)) or Figure()
    )

    def blind(obs, actions):
        return obs * 0, torch.zeros(actions.shape)

    wm.film_open_loop(GAME, blind, data, tmp_path / "videos")
    longest = data.view.unique(return_counts=True)[1].sort(descending=True)[0][:3].tolist()
    assert [len(frames) for frames in written] == longest
    first = data.view == int(
        data.view[data.view == data.view.unique()[data.view.unique(return_counts=True)[1].argmax()]][0]
    )
    assert torch.equal(drawn[0][0].obs, data.obs[first][:1]) and not any(
        step.obs.any() for step, _ in drawn[1 : longest[0]]
    )
    assert torch.equal(torch.cat([step.next_obs for step, _ in drawn[: longest[0]]]), data.next_obs[first])  # the truth


def test_pictures_that_fail_do_not_end_a_finished_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wm, "draw_transitions", lambda *_: 1 / 0)
    folder = run(tmp_path, run_name="one")
    assert "warning: draw failed (ZeroDivisionError" in capsys.readouterr().out
    assert (folder / "model.pt").exists() and (folder / "metrics.json").exists()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, run_name="one", resume=True)
    assert ended.value.code == 0 and "is finished" in capsys.readouterr().out


def test_a_copy_of_the_script_alone_trains_on_a_plain_file(data, tmp_path):
    """On a terminal that has no signs but those of ASCII."""
    shutil.copy(SCRIPT, tmp_path)
    path = save(tmp_path / "plain.npz", data)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PYTHONIOENCODING": "ascii"
    }
    command = [sys.executable, "world_model_test.py", *flags, "--run-name", "one"]
    result = subprocess.run([*command, "--data", path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "one" / "model.pt").exists() and "share of frames" in result.stdout
    for extra in ([], ["--data", "record.npz"]):
        records.save_records(tmp_path / "record.npz", stag_hunt.collect(400, seed=1))
        result = subprocess.run([*command, *extra], cwd=tmp_path, env=environment, capture_output=True, text=True)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2 and "which is not here" in line


def test_a_signal_after_the_last_step_ends_the_run_at_once(tmp_path, monkeypatch, no_pictures):
    whole = run(tmp_path, run_name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(wm, "measure", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), pytest.fail("goes on")))
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, run_name="stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert same(whole, run(tmp_path, run_name="stopped", resume=True))


@pytest.mark.parametrize(
    "returned, told",
    [
        ("8 * obs - 4, 0.0 * actions", "from -4 to 4, not in [0, 1]"),
        ("255 * obs, 0.0 * actions", "from 0 to 255, not in [0, 1]"),
        ("0.5 + 0.5 * obs, 0.0 * actions", None),
    ],
)
def test_outputs_that_are_no_shares_get_a_warning(returned, told, tmp_path, capsys, no_pictures):
    (tmp_path / "theirs.py").write_text(f"def f(obs, actions):\n    return {returned}\n")
    sys.modules.pop("theirs", None)
    run(tmp_path, load="theirs:f")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: theirs:f")]
    assert len(warnings) == (told is not None) and all(told in line for line in warnings)
    sys.modules.pop("theirs", None)


def test_a_module_that_ends_the_program_is_refused(tmp_path, capsys):
    (tmp_path / "theirs.py").write_text("import sys\nsys.exit(0)\n")
    assert "cannot be imported (SystemExit" in refused(capsys, tmp_path, load="theirs:f")


def test_a_function_that_fails_late_or_writes_into_its_inputs(tmp_path, capsys):
    (tmp_path / "theirs.py").write_text(
        "calls = []\n"
        "def late(obs, actions):\n    calls.append(1)\n    return obs, 0.0 * actions if len(calls) < 2 else 1 / 0\n"
        "def writes(obs, actions):\n    actions[:] = 99\n    return obs, 0.0 * actions\n"
    )
    sys.modules.pop("theirs", None)
    with pytest.raises(SystemExit) as error:
        run(tmp_path, run_name="late", load="theirs:late")
    assert error.value.code == 1 and "theirs:late failed (ZeroDivisionError" in capsys.readouterr().err
    model, actions = wm.Foreign("theirs:writes"), torch.zeros(3, 4, dtype=torch.int64)
    model.predict(torch.zeros(3, 7, 8, 8, dtype=torch.uint8), actions)
    assert not actions.any()
    sys.modules.pop("theirs", None)


def test_other_data_are_noticed_when_resumed(data, tmp_path, monkeypatch, no_pictures, capsys):
    path = save(tmp_path / "plain.npz", data)
    stop_at(monkeypatch, 13, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(tmp_path, run_name="one", data=path)
    rewards = data.rewards.numpy().copy()
    rewards[-1] = 1.0  # in the test's rows
    save(tmp_path / "plain.npz", data, rewards=rewards)
    with pytest.raises(SystemExit) as error:
        run(tmp_path, run_name="one", data=path, resume=True)
    assert error.value.code == 2 and "the data are not those" in capsys.readouterr().err


def test_several_stags_can_be_duplicated():
    several = GAME._replace(single_stag=False)
    assert wm.impossible(learner()) == ["duplicated", "jumped", "reappeared", "reward"]
    assert wm.impossible(learner(game=several)) == ["jumped", "reappeared", "reward"]
    assert wm.impossible(learner(mask=False)) == ["duplicated", "reward"]
    assert wm.impossible(learner(model="cell")) == ["reward"] and not wm.impossible(learner(model="mse"))


def test_through_the_command_line(tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    command = [sys.executable, str(SCRIPT), *flags, "--track", "--run-name", "one", "--stag-moves"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "one" / "metrics.json").exists() and "share of frames" in result.stdout
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "is finished" in again.stdout


def test_to_transitions_wants_as_many_planes_as_players():
    rows = np.zeros((3, 6, 4, 4), np.uint8), np.zeros((3, 4), np.int64), np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"n \+ 3, H, W.* got obs \(3, 6, 4, 4\), actions \(3, 4\)"):
        to_transitions({"obs": rows[0], "actions": rows[1], "rewards": rows[2], "next_obs": rows[0]}, "it")
    assert F.one_hot(torch.tensor([0]), 7).shape == (1, 7)
