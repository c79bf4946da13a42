"""world_model_test.py: its measures on hand-made frames, its losses, learning, resuming, and bad input."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
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
from envs import stag_hunt  # noqa: E402
from world_model_test import Args, Game, Learner, Transitions, places, to_transitions, violations  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")
REWARDS = [0.0, 0.25, 1 / 3, 0.5, 1.0, 2.5, 10 / 3, 5.0]
GAME = Game(4, 8, 8, 7, REWARDS, True, REWARDS)
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


def learner(seed=0, game=GAME, **changes) -> Learner:
    torch.manual_seed(seed)
    return Learner(Args(**{**SMALL, **changes}), game, CPU)


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
    wm.check_mask(game, data)


def test_a_reward_that_training_never_saw_is_lawful_if_the_game_pays_it(data):
    """Four hunters of a stag are rare: a model cannot predict their reward, but the truth breaks no rule."""
    train = data.select((data.rewards < 5.0).all(1).nonzero()[:, 0])
    game = wm.find_game(train, data, Args())
    assert 5.0 not in game.reward_values and {0.0, 0.25, 1.0, 2.5, 5.0} < set(game.legal_rewards)
    assert 10.0 not in game.legal_rewards  # nobody catches a stag alone
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

    game = wm.find_game(data, data, Args())
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
    linked = data.game[1:] == data.game[:-1]
    assert 0.5 < float(linked.float().mean()) < 1.0
    assert torch.equal(data.next_obs[:-1][linked], data.obs[1:][linked])
    assert torch.equal(data.t[:-1][linked] + 1, data.t[1:][linked]) and (data.t[1:][~linked] == 0).all()
    begun = []
    wm.measure_open_loop(lambda obs, _: (begun.append(obs), (obs, None))[1], data, 6)
    lasting = [i for i in range(len(data.obs) - 5) if len(set(data.game[i : i + 6].tolist())) == 1]
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
    for parameter in (*ours.model.cell_head.parameters(), *ours.model.gone_head.parameters()):
        torch.nn.init.zeros_(parameter)
    result = wm.calibration(ours, data)
    assert result["nll"] == pytest.approx(5 * np.log(65) + 2 * 64 * np.log(2), rel=1e-4)
    first = places(data.next_obs, GAME)[:, :4] == 0
    assert result["ece"] == pytest.approx(abs(1 / 65 - float(first.float().mean())), abs=1e-4)


def test_the_limit_is_one_unless_stags_move():
    data, config = games(2_000, stag_moves=True), stag_hunt.Config(stag_moves=True)
    assert wm.game_limit(None, data) == wm.game_limit(stag_hunt.Config(), data) == 1.0
    gone = ~data.obs[:, 5].flatten(1).bool().any(1)
    limit = wm.game_limit(config, data.select(gone.nonzero()[:50, 0]), rows=20, draws=20)
    assert limit == 1.0  # no stag is left that could move
    inside = data.obs[:, 5, 1:-1, 1:-1].flatten(1).bool().any(1)
    limit = wm.game_limit(config, data.select(inside.nonzero()[:, 0]), rows=40, draws=100)
    assert 0.2 < limit < 0.45  # five ways, each as likely, but for what stands in the way


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
    ours.model.trunk = torch.nn.Module()
    ours.model.trunk.forward = lambda planes: seen.append(planes) or torch.zeros(len(planes), 8, 8, 8)
    ours.model(frame(players=(5, None, 63, 0))[None], torch.tensor([[2, -1, 6, 4]]))
    painted = seen[0][0, 7:35].view(4, 7, 64)
    assert painted.nonzero().tolist() == [[0, 2, 5], [2, 6, 63], [3, 4, 0]] and (seen[0][0, 35] == 1).all()
    ours.model.painted = False
    ours.model(frame(players=(5, None, 63, 0))[None], torch.tensor([[2, -1, 6, 4]]))
    constant = seen[1][0, 7:35].view(4, 7, 64)
    assert constant.mean(2).nonzero().tolist() == [[0, 2], [2, 6], [3, 4]] and constant.unique().tolist() == [0, 1]


def test_who_leaves_is_read_off_the_own_actions_output():
    """The head says 0, 1, ... for the actions and 7 for the stag; who is gone already has no action."""
    ours = learner()
    last = ours.model.gone_head[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.arange(8.0)
    prediction = ours.model(frame(players=(5, None, 63, 63))[None], torch.tensor([[2, -1, 6, 4]]))
    assert prediction.entities[0, :, -1].tolist() == [2.0, 0.0, 6.0, 4.0, 7.0]


def test_the_mask_leaves_what_is_reachable():
    reach = learner().model.reach
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
    before = {name: value.clone() for name, value in ours.model.named_parameters()}
    batch = data.select((data.rewards > 0).any(1).nonzero()[:64, 0])
    for count in (1, 2):
        losses = ours.update(batch)
        assert {int(state["step"]) for state in ours.optimizer.state.values()} == {count}
    still = {name for name, value in ours.model.named_parameters() if torch.equal(value, before[name])}
    assert not still and ("contrastive" in losses) == (contrastive > 0.0)
    assert float(losses["total"]) == pytest.approx(
        float(losses["frame"] + losses["reward"]) + contrastive * float(losses.get("contrastive", 0.0)), rel=1e-5
    )


def test_the_reward_moves_no_frame_head_and_the_frame_no_reward_head(data):
    ours = learner()
    losses = ours.losses(data.select(torch.arange(64)))
    for loss, other in (("reward", "cell_head"), ("frame", "reward_head")):
        parameters = list(getattr(ours.model, other).parameters())
        assert torch.autograd.grad(losses[loss], parameters, retain_graph=True, allow_unused=True) == (None,) * len(
            parameters
        )


def test_the_likelihood_is_the_product_over_entities_and_cells(data):
    ours, one = learner(), data.select(torch.tensor([7]))
    prediction = ours.model(one.obs, one.actions, one.next_obs)
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
    expected, _ = ours.model.expected(one.obs[:1], one.actions[:1])
    drawn, rewards = ours.model.predict(one.obs, one.actions, torch.Generator().manual_seed(3))
    assert (drawn.float().mean(0) - expected[0]).abs().max() < 5 * 0.5 / 4_000**0.5
    assert np.isin(rewards.numpy(), np.float32(REWARDS)).all()
    likely, _ = ours.model.predict(one.obs[:1], one.actions[:1])
    if kind == "cell":
        assert torch.equal(likely[0].bool(), expected[0] > 0.5)


def test_learns_the_game_from_little(data):
    """Copying the frame is right in less than half of the frames."""
    game = wm.find_game(data, data, Args())
    ours = learner(game=game, hidden_dim=32)
    for step in range(400):
        ours.update(data.select(torch.randint(len(data.obs), (128,))), step / 400)
    fresh = games(1_000, seed=77)
    result = wm.measure_frames(game, ours.model.predict, fresh)
    assert result["exact"] > 0.6 and result["violation any"] < 0.4


@pytest.mark.parametrize("kind, steps", [("mse", 500), ("cell", 1_500), ("entity", 500)])
def test_learns_a_few_transitions_by_heart(kind, steps, data):
    ours, few = learner(model=kind, hidden_dim=32), data.select((data.rewards > 0).any(1).nonzero()[:16, 0])
    for step in range(steps):
        ours.update(few, step / steps)
    result = wm.measure_frames(GAME, ours.model.predict, few)
    assert result["exact"] == 1.0 and (kind == "mse" or result["reward"] == 1.0)


# --- runs ---
@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take longer than all else in so small a run."""
    for name in ("draw_transitions", "draw_summary"):
        monkeypatch.setattr(wm, name, lambda *_, **__: Figure())


def run(tmp_path, **changes) -> Path:
    return wm.main(Args(**{**SMALL, "runs_dir": str(tmp_path / "runs"), **changes}))


def same(a: Path, b: Path) -> bool:
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (a, b))
    texts = [[(folder / name).read_text() for name in ("eval.csv", "metrics.json")] for folder in (a, b)]
    return texts[0] == texts[1] and all(torch.equal(ours[key], theirs[key]) for key in ours)


def stop_at(monkeypatch, step: int, number: int) -> None:
    real, count = Learner.update, [0]

    def update(*args):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(Learner, "update", update)


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
    monkeypatch.setattr(wm, "collect", lambda args, config, rows, seed: games(rows, seed + 1))
    assert "the data are not those" in line()
    for name in ("model", "optimizer", "data"):
        state = torch.load(path, weights_only=True)
        del state[name]
        torch.save(state, path)
        with pytest.raises((KeyError, SystemExit)):
            run(tmp_path, run_name="stopped", resume=True)
        path.write_bytes(whole)


def test_a_saved_model_and_a_function_are_tested_alike(tmp_path, request):
    trained = run(tmp_path, run_name="trained")
    for name in ("summary", "transitions_worst", "transitions_random"):
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
        ({"episode": np.zeros(2_000, int)}, "has 2000 rows of 1 games: too few to hold out a fifth"),
        ({"t": columns["t"] + 0.5}, "a whole number in each row of episode, agent, t expected"),
        ({"agent": columns["agent"][:7]}, "a whole number in each row of episode, agent, t expected"),
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
    assert wm.same_reward(GAME) == 0.02 and wm.same_reward(game) < 0.0003


def test_a_record_of_games_is_tested_on_games_of_its_own(tmp_path):
    record = stag_hunt.collect(2_000, stag_hunt.Config(stag_moves=True), 35, ("NS", "NH"), 3)
    stag_hunt.save_dataset(tmp_path / "record.npz", record)
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
    "grey": ({"obs": "grey"}, "other values than 0 and 1"),
    "nan": ({"rewards": "nan"}, "1 rows have rewards that are not finite"),
    "planes": ({"obs": "fewer", "next_obs": "fewer"}, "(N, n + 3, H, W), actions and rewards (N, n) expected, got obs"),
    "unequal": ({"obs": "few", "next_obs": "few"}, "got obs (3, 7, 8, 8), actions (2000, 4)"),
    "objects": ({"actions": "objects"}, "Python objects"),
    "no rows": ({"obs": "none", "actions": "none", "rewards": "none", "next_obs": "none"}, "has 0 rows: too few"),
    "few rows": (
        {"obs": "few", "actions": "few", "rewards": "few", "next_obs": "few"},
        "has 3 rows: too few to hold out",
    ),
    "teleport": ({"next_obs": "teleport"}, "add --no-mask"),
    "words": ({"actions": "words"}, "numbers expected in obs, actions, rewards, next_obs"),
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
    path = save(tmp_path / "cut.npz", data)
    Path(path).write_bytes(Path(path).read_bytes()[:2_000])
    for name in ("pickle.npz", "cut.npz", "nowhere.npz"):
        assert name in refused(capsys, tmp_path, data=str(tmp_path / name))


FUNCTIONS = {
    "shape": ("obs[:, :3], actions * 0.0", "next_obs of shape (1000, 3, 8, 8), (1000, 7, 8, 8) expected"),
    "rewards": ("obs, actions[:, 0] * 0.0", "rewards of shape (1000,), (1000, 4) expected"),
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


def test_models_that_do_not_fit_are_refused(tmp_path, no_pictures, capsys):
    small = run(tmp_path, run_name="small", env_id="4p5b4x4")
    with pytest.raises(SystemExit) as error:
        run(tmp_path, load=str(small / "model.pt"))
    line = capsys.readouterr().err.strip()
    assert error.value.code == 2 and "frames (7, 4, 4)" in line and "frames (7, 8, 8)" in line and "\n" not in line
    single = run(tmp_path, run_name="single")
    with pytest.raises(SystemExit) as error:
        run(tmp_path, load=str(single / "model.pt"), env_id="4p6b8x8")
    line = capsys.readouterr().err.strip()
    assert error.value.code == 2 and "one stag; the data" in line and "several stags" in line
    (tmp_path / "no.pt").write_bytes(b"no model")
    for name, part in (("no.pt", "is not a model"), ("nothing:f", "cannot be imported")):
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
    assert "nothing to film" in refused(capsys, tmp_path, capture_video=True)
    path = save(tmp_path / "plain.npz", data)
    assert "for games that are collected here" in refused(capsys, tmp_path, data=path, stag_moves=True)


def test_a_signal_after_the_last_step_ends_the_run_at_once(tmp_path, monkeypatch, no_pictures):
    whole = run(tmp_path, run_name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(wm, "measure_all", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), pytest.fail("goes on")))
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, run_name="stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert same(whole, run(tmp_path, run_name="stopped", resume=True))


def test_a_function_that_fails_late_or_writes_into_its_inputs(tmp_path, capsys):
    (tmp_path / "theirs.py").write_text(
        "def late(obs, actions):\n    return obs, 0.0 * actions if len(obs) > 8 else 1 / 0\n"
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
    for single, expected in ((True, ["duplicated", "jumped", "reappeared", "reward"]), (False, ["jumped"])):
        assert set(expected) <= set(wm.impossible(Args(), GAME._replace(single_stag=single)))
    assert "duplicated" not in wm.impossible(Args(), GAME._replace(single_stag=False))


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
