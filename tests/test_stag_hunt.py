"""Markov Stag-Hunt: its rules, PettingZoo's own tests, scalar against vectorised form, its records, exact posterior."""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections import deque
from pathlib import Path

import numpy as np
import pettingzoo
import pytest
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test, render_test, seed_test

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import envs  # noqa: E402, F401
from envs import stag_hunt  # noqa: E402
from envs.records import FIELDS, Record, check_records  # noqa: E402
from envs.stag_hunt import (  # noqa: E402
    DOWN,
    HUNT_HARE,
    HUNT_STAG,
    LEFT,
    NUM_ACTIONS,
    RIGHT,
    STAY,
    STEPS,
    UP,
    Config,
    StagHunt,
    VectorStagHunt,
    collect,
    commonest_shares,
    history_bayes,
    history_posterior,
    replay,
    rosters,
    symmetries,
)

GONE = 64
VARIANTS = {
    "plain": {},
    "two stags": {"n_stags": 2},
    "small": {"size": 4},
    "blocks": {"n_blocks": 3},
    "moving": {"stag_moves": True, "n_stags": 2},
    "many": {"size": 5, "n_players": 6, "n_hares": 7, "n_blocks": 1, "stag_moves": True, "stag_reward": 3.0},
    "no prey of one kind": {"n_stags": 0, "n_hares": 2},
}


def at(players, stags=(GONE,), hares=(GONE,) * 4, **more):
    """A game of 8x8 in this state; cells are row * 8 + column."""
    env = StagHunt(**{key: value for key, value in more.items() if key != "t"})
    env.reset(seed=0)
    env.set_state(
        {"players": np.array(players), "stags": np.array(stags), "hares": np.array(hares), "t": more.get("t", 0)}
    )
    return env


def act(env, *actions):
    """Step with one action per player; those of players who are gone are left out."""
    names = dict(zip(env.possible_agents, actions, strict=True))
    return env.step({name: action for name, action in names.items() if name in env.agents})


def mask(env, player):
    return env._observe(env.possible_agents)[f"player_{player}"]["action_mask"].tolist()


# --- PettingZoo ---
@pytest.mark.parametrize("name", VARIANTS)
def test_pettingzoo_parallel(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_api_test(StagHunt(**VARIANTS[name]), num_cycles=200)
    parallel_seed_test(lambda: StagHunt(**VARIANTS[name]))


def test_pettingzoo_turn_by_turn():
    api_test(stag_hunt.raw_env(), num_cycles=100)
    api_test(stag_hunt.env(), num_cycles=100)
    seed_test(stag_hunt.env, num_cycles=50)


def test_pettingzoo_render(capsys):
    render_test(stag_hunt.env)
    assert "step 1 of 35" in capsys.readouterr().out  # "human" prints


@pytest.mark.parametrize(("env_id", "size", "stags"), [("4p5b8x8", 8, 1), ("4p6b8x8", 8, 2), ("4p5b4x4", 4, 1)])
def test_presets_are_registered(env_id, size, stags):
    env = pettingzoo.make("parallel", env_id, max_cycles=7)
    config = Config(**stag_hunt.PRESETS[env_id])
    assert isinstance(env, StagHunt) and env.config == config == Config(size, 4, stags, 4) and env.max_cycles == 7
    observations, infos = env.reset(seed=3)
    assert observations["player_0"]["observation"].shape == (7, size, size)
    assert infos["player_2"]["previous_actions"].tolist() == [-1] * 4
    assert pettingzoo.make("aec", env_id).metadata["name"] == "markov_stag_hunt_v0"
    assert isinstance(pettingzoo.make("parallel", "markov_stag_hunt_v0", n_blocks=1), StagHunt)


def test_spaces_are_the_same_objects_and_hold_what_is_seen():
    env = StagHunt(n_blocks=2)
    assert env.observation_space("player_1") is env.observation_space("player_1")
    assert env.action_space("player_1") is env.action_space("player_1")
    observations, _ = env.reset(seed=1)
    for agent, seen in observations.items():
        assert env.observation_space(agent).contains(seen)


# --- rules ---
def test_walking_and_what_is_illegal():
    env = at([0, 7, 56, 63], stags=(20,), hares=(30, 31, 32, 33))
    assert mask(env, 0) == [0, 1, 0, 1, 1, 0, 0]
    assert mask(env, 3) == [1, 0, 1, 0, 1, 0, 0]
    _, rewards, terminated, truncated, infos = act(env, RIGHT, LEFT, UP, DOWN)
    assert env.get_state()["players"].tolist() == [1, 6, 48, 63]  # down is off the board there
    assert set(rewards.values()) == {0.0} and not any(terminated.values()) and not any(truncated.values())
    assert infos["player_2"]["previous_actions"].tolist() == [UP, DOWN, RIGHT, LEFT]
    act(env, HUNT_STAG, HUNT_HARE, STAY, STAY)  # neither is there
    assert env.get_state()["players"].tolist() == [1, 6, 48, 63]


def test_a_hare_is_shared_by_all_who_hunt_it():
    env = at([9, 9, 9, 20], stags=(40,), hares=(9, 20, 50, 51))
    assert mask(env, 0)[HUNT_HARE] == 1 and mask(env, 0)[HUNT_STAG] == 0
    _, rewards, terminated, truncated, _ = act(env, HUNT_HARE, HUNT_HARE, STAY, HUNT_HARE)
    assert rewards == {"player_0": 0.5, "player_1": 0.5, "player_2": 0.0, "player_3": 1.0}
    assert terminated == {"player_0": True, "player_1": True, "player_2": False, "player_3": True}
    assert not any(truncated.values())
    assert env.agents == ["player_2"]
    state = env.get_state()
    assert state["players"].tolist() == [GONE, GONE, 9, GONE] and state["hares"].tolist() == [GONE, GONE, 50, 51]
    assert mask(env, 2) == [1, 1, 1, 1, 1, 0, 0]  # no hare is left there


def test_a_stag_takes_two():
    env = at([9, 20, 30, 31], stags=(9,), hares=(50, 51, 52, 53))
    assert mask(env, 0)[HUNT_STAG] == 0  # alone
    assert act(env, HUNT_STAG, STAY, STAY, STAY)[1]["player_0"] == 0.0
    env = at([9, 9, 9, 31], stags=(9,), hares=(50, 51, 52, 53))
    assert mask(env, 0)[HUNT_STAG] == 1
    _, rewards, terminated, _, _ = act(env, HUNT_STAG, STAY, RIGHT, HUNT_STAG)  # legal, but nobody helps
    assert set(rewards.values()) == {0.0} and not any(terminated.values())
    env = at([9, 9, 9, 31], stags=(9,), hares=(50, 51, 52, 53))
    _, rewards, terminated, _, _ = act(env, HUNT_STAG, HUNT_STAG, HUNT_STAG, STAY)
    assert [rewards[f"player_{i}"] for i in range(4)] == pytest.approx([10 / 3, 10 / 3, 10 / 3, 0.0])
    assert env.get_state()["stags"].tolist() == [GONE] and env.agents == ["player_3"]


def test_an_episode_ends_when_all_are_gone_or_time_is_up():
    env = at([9, 9, 20, 21], stags=(9,), hares=(20, 21, 52, 53))
    _, _, terminated, truncated, _ = act(env, HUNT_STAG, HUNT_STAG, HUNT_HARE, HUNT_HARE)
    assert all(terminated.values()) and not any(truncated.values()) and env.agents == []
    env = at([9, 0, 1, 2], stags=(60,), hares=(9, 21, 52, 53), max_cycles=5, t=4)
    _, _, terminated, truncated, _ = act(env, HUNT_HARE, STAY, STAY, STAY)
    assert terminated["player_0"] and not truncated["player_0"]  # it caught its hare at the last moment
    assert truncated["player_1"] and not terminated["player_1"] and env.agents == []


def test_the_view_is_ego_first():
    env = at([1, 10, 20, GONE], stags=(30,), hares=(40, 41, GONE, 43))
    seen = env._observe(["player_1"])["player_1"]["observation"]
    assert [np.flatnonzero(plane).tolist() for plane in seen] == [[10], [20], [], [1], [], [30], [40, 41, 43]]


def test_states_go_in_and_out():
    env = StagHunt(n_blocks=2, stag_moves=True)
    env.reset(seed=5)
    for _ in range(4):
        act(env, UP, LEFT, STAY, DOWN)
    state = env.get_state()
    other = StagHunt(n_blocks=2, stag_moves=True)
    other.set_state(state)
    for _ in range(5):
        one, two = act(env, UP, LEFT, STAY, DOWN), act(other, UP, LEFT, STAY, DOWN)
        assert one[1:4] == two[1:4]
        assert all((one[0][name]["observation"] == two[0][name]["observation"]).all() for name in one[0])
    del state["seed"]
    after = set()
    for _ in range(60):  # without its seed, the stag's steps are drawn anew
        other.set_state(state)
        act(other, STAY, STAY, STAY, STAY)
        after.add(int(other.get_state()["stags"][0]))
    assert len(after) > 1


@pytest.mark.parametrize(
    "change", [{"players": [0, 1]}, {"stags": [65]}, {"hares": [-1, 0, 1, 2]}, {"who": 1}, {"blocks": [True]}]
)
def test_wrong_states_are_refused(change):
    env = StagHunt()
    env.reset(seed=1)
    with pytest.raises(ValueError, match="state"):
        env.set_state({**env.get_state(), **change})


@pytest.mark.parametrize(
    "arguments", [{"size": 1}, {"n_hares": 64}, {"n_players": 0}, {"max_cycles": 0}, {"render_mode": "svg"}]
)
def test_impossible_games_are_refused(arguments):
    with pytest.raises(ValueError, match=r"expected|no room"):
        StagHunt(**arguments)
    env = StagHunt()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="player_1: expected an action"):
        env.step({"player_0": 1, "player_1": 7, "player_2": 0, "player_3": 0})


@pytest.mark.parametrize("count", [1, 2, 4])
def test_boards_with_obstacles_are_connected(count):
    config = Config(n_blocks=count)
    blocked, prey, players = stag_hunt.draw_layouts(np.arange(300), config)
    for board, beasts, who in zip(blocked, prey, players, strict=True):
        free = set(np.flatnonzero(~board).tolist())
        assert 3 * count <= GONE - len(free) <= 4 * count
        reached, queue = {min(free)}, deque([min(free)])
        while queue:
            cell = queue.popleft()
            near = [cell - 8, cell + 8] + [cell - 1] * (cell % 8 > 0) + [cell + 1] * (cell % 8 < 7)
            fresh = [other for other in near if other in free and other not in reached]
            reached.update(fresh)
            queue.extend(fresh)
        assert reached == free
        assert len(set(beasts.tolist())) == 5 and set(beasts.tolist()) | set(who.tolist()) <= free
    assert len({tuple(board) for board in blocked}) > 50 * count


def test_first_positions_are_uniform():
    _, prey, players = stag_hunt.draw_layouts(np.arange(40_000), Config())
    for places in (prey[:, 0], prey[:, 4], players[:, 0], players[:, 3]):
        counts = np.bincount(places, minlength=64)
        assert ((counts - 625) ** 2 / 625).sum() < 120  # chi-square, 63 degrees of freedom: p < 2e-5
    assert np.mean(players[:, 0] == players[:, 1]) == pytest.approx(1 / 64, abs=0.004)  # players may share a cell


def test_random_numbers_are_uniform_and_depend_on_seed_stream_and_index_alone():
    seeds = np.arange(2_000)
    u = stag_hunt.uniforms(seeds, 2, 5, 50)
    assert ((u >= 0) & (u < 1)).all() and len(np.unique(u)) == u.size
    counts = np.histogram(u, 100, (0, 1))[0]
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 170  # 99 degrees of freedom: p < 1e-5
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.015
    assert (stag_hunt.uniforms(seeds[700:701], 2, 7, 3) == u[700, 2:5]).all()
    assert (stag_hunt.uniforms(seeds, 3, 5, 50) != u).all()


# --- scalar and vectorised form are the same game ---
@pytest.mark.parametrize("name", VARIANTS)
def test_scalar_equals_vector(name):
    config, games = Config(**VARIANTS[name]), 12
    n, seeds = config.n_players, np.arange(100, 100 + games)
    vector = VectorStagHunt(config, seeds)
    scalars = [StagHunt(**VARIANTS[name], max_cycles=40) for _ in range(games)]
    seen = [env.reset(seed=int(seed))[0] for env, seed in zip(scalars, seeds, strict=True)]
    generator, caught = np.random.default_rng(1), 0
    for _ in range(40):
        legal, alive = vector.legal(), vector.alive
        agents = np.tile(np.arange(n), games)
        repeated = [np.repeat(values, n, 0) for values in (vector.players, vector.stags, vector.hares, vector.blocked)]
        views = stag_hunt.planes(stag_hunt.ego_first(repeated[0], agents), *repeated[1:], config)
        for b, i in itertools.product(range(games), range(n)):
            if alive[b, i]:
                assert (seen[b][f"player_{i}"]["observation"] == views[b * n + i]).all()
                assert (seen[b][f"player_{i}"]["action_mask"] == legal[b, i]).all()
        actions = generator.integers(NUM_ACTIONS, size=(games, n))  # illegal ones too
        hunts = legal[..., HUNT_STAG:].any(2) & (generator.random((games, n)) < 0.7)
        actions[hunts] = np.where(legal[..., HUNT_STAG], HUNT_STAG, HUNT_HARE)[hunts]
        rewards = vector.step(actions)
        for b, env in enumerate(scalars):
            if not env.agents:
                continue
            acting = {name: int(actions[b, int(name.split("_")[1])]) for name in env.agents}
            seen[b], paid, terminated, truncated, _ = env.step(acting)
            for name in acting:
                i = int(name.split("_")[1])
                assert paid[name] == rewards[b, i]
                assert terminated[name] == (vector.players[b, i] == config.cells)
                assert truncated[name] == (vector.t == 40 and not terminated[name])
                caught += terminated[name]
            state = env.get_state()
            for key in ("players", "stags", "hares"):
                assert (state[key] == getattr(vector, key)[b]).all()
    assert caught > 5


# --- scripted policies ---
def shortest(board, start, goal):
    """Length of the shortest way on a board of free cells, by a queue."""
    size = int(len(board) ** 0.5)
    lengths, queue = {start: 0}, deque([start])
    while queue:
        cell = queue.popleft()
        row, column = divmod(cell, size)
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            r, c = row + down, column + right
            if 0 <= r < size and 0 <= c < size and board[r * size + c] and r * size + c not in lengths:
                lengths[r * size + c] = lengths[cell] + 1
                queue.append(r * size + c)
    return lengths.get(goal, 10**9)


@pytest.mark.parametrize("name", ["plain", "two stags", "blocks", "no prey of one kind"])
def test_scripted_policies_walk_shortest_ways_to_the_nearest_prey(name):
    config = Config(**VARIANTS[name])
    games = VectorStagHunt(config, np.arange(15))
    for _ in range(6):
        legal = games.legal()
        probabilities = games.policy_probabilities(("NS", "NH", "NA", "random"), legal)
        assert probabilities.sum(3) == pytest.approx(1.0, abs=1e-6)
        assert (probabilities[~np.broadcast_to(legal[:, :, None], probabilities.shape)] == 0).all()
        for b, i in itertools.product(range(15), range(4)):
            if not games.alive[b, i]:
                continue
            board, here = ~games.blocked[b, :-1], int(games.players[b, i])
            stags, hares = (
                [(shortest(board, here, int(p)), int(p), hunt) for p in prey[b] if p < GONE]
                for prey, hunt in ((games.stags, HUNT_STAG), (games.hares, HUNT_HARE))
            )
            for k, ways in enumerate((sorted(stags), sorted(hares), sorted(stags + hares))):
                wanted = np.zeros(NUM_ACTIONS)
                if not ways:
                    wanted[STAY] = 1
                elif ways[0][0] == 0:
                    hunt = ways[0][2]
                    wanted[hunt if legal[b, i, hunt] else STAY] = 1
                else:
                    length, goal, _ = ways[0]
                    for a, step in enumerate((-8, 8, -1, 1)):
                        if legal[b, i, a] and shortest(board, here + step, goal) < length:
                            wanted[a] = 1
                    wanted /= wanted.sum()
                assert probabilities[b, i, k] == pytest.approx(wanted, abs=1e-6)
            assert probabilities[b, i, 3] == pytest.approx(legal[b, i] / legal[b, i].sum(), abs=1e-6)
        games.step(games.sample(probabilities[:, :, 0]))


def test_ties_and_noise():
    games = VectorStagHunt(Config(), np.arange(500))
    legal = games.legal()
    exact, first = (games.policy_probabilities(("NS", "NH"), legal, tie) for tie in ("random", "first"))
    assert set(np.unique(first)) == {0.0, 1.0}
    assert ((exact > 0) >= (first > 0)).all() and (exact < 1).any()
    noisy = games.policy_probabilities(("NS", "NH"), legal, epsilon=0.2)
    uniform = legal / legal.sum(2, keepdims=True)
    assert noisy == pytest.approx(0.8 * exact + 0.2 * uniform[:, :, None], abs=1e-6)


def test_sampled_actions_have_the_stated_probabilities():
    games = VectorStagHunt(Config(), np.arange(20_000))
    probabilities = np.tile(np.array([0.1, 0, 0.25, 0, 0.4, 0.25, 0]), (20_000, 4, 1))
    actions = games.sample(probabilities)
    shares = np.bincount(actions.ravel(), minlength=7) / actions.size
    assert shares == pytest.approx(probabilities[0, 0], abs=0.006)
    assert shares[[1, 3, 6]].tolist() == [0, 0, 0]


def test_the_nearest_prey_of_either_kind_may_be_a_stag_or_a_hare():
    games = VectorStagHunt(Config(), np.arange(4))
    games.players = np.array([[0, 9, 9, GONE], [0, 9, 63, 56], [0, 9, 63, 56], [0, 9, 63, 56]])
    games.stags = np.array([[9], [9], [GONE], [16]])
    games.hares = np.array([[2, 40, 41, 42], [24, 40, 41, 42], [24, GONE, GONE, GONE], [2, 40, 41, 42]])
    legal = games.legal()
    first, second = games.policy_probabilities(("NA",), legal)[:, :2, 0].transpose(1, 0, 2).argmax(2)
    assert first.tolist() == [RIGHT, DOWN, DOWN, RIGHT]  # 2 before 9, 9 before 24, no stag left, 2 before 16
    assert second[0] == HUNT_STAG and second[1] == STAY and not legal[1, 1, HUNT_STAG]  # alone on it: waits, as NS


def test_actions_of_a_record_have_its_probabilities_and_do_not_depend_on_the_games_beside():
    data = collect(20_000, strategies=("NS", "NH", "NA"), seed=6)
    arrays = data.arrays
    for k in range(3):
        rows = np.flatnonzero(arrays["strategy"] == k)
        chances = arrays["policy_probs"][rows, k].astype(float)
        counts = np.bincount(arrays["action"][rows], minlength=NUM_ACTIONS)
        assert (np.abs(counts - chances.sum(0)) <= 4 * np.sqrt((chances * (1 - chances)).sum(0)) + 1e-6).all()
        assert chances.sum(1) == pytest.approx(1.0) and (chances[~arrays["action_mask"][rows]] == 0).all()
        assert len(rows) > 4_000 and (counts[[HUNT_STAG, HUNT_HARE]] > 0).tolist() == [k != 1, k != 0]
    alone = collect(600, strategies=("NS", "NH", "NA"), seed=6, games=1).arrays
    rows = np.flatnonzero(arrays["episode"] < alone["episode"].max())
    for name in ("obs", "action", "policy_probs", "strategy"):
        assert (alone[name][: len(rows)] == arrays[name][rows]).all()


@pytest.mark.parametrize("strategies", [2, 3])
def test_rosters(strategies):
    seats, prior = rosters(strategies, 4)
    assert len(seats) == strategies**4 and prior.sum() == pytest.approx(1.0)
    counts = np.stack([(seats == k).sum(1) for k in range(strategies)], 1)
    shares = {}
    for kind, p in zip(map(tuple, counts.tolist()), prior, strict=True):
        shares[kind] = shares.get(kind, 0) + p
    assert np.allclose(list(shares.values()), 1 / len(shares))  # each number of players of each strategy
    for kind in shares:
        assert len(set(prior[(counts == kind).all(1)].round(12))) == 1  # each order of seats


# --- records ---
@pytest.fixture(scope="module")
def data() -> Record:
    return collect(6_000, seed=3)


def test_a_record_has_the_rows_that_were_asked_for(data):
    check_records(data)
    arrays = data.arrays
    assert set(arrays) == set(FIELDS) and len(arrays["action"]) == 6_000
    assert all(values.dtype == FIELDS[name].dtype for name, values in arrays.items())
    assert arrays["obs"].shape == (6_000, 7, 8, 8) and arrays["policy_probs"].shape == (6_000, 2, 7)
    every = np.arange(6_000)
    assert arrays["action_mask"][every, arrays["action"]].all()
    assert arrays["policy_probs"][every, arrays["strategy"], arrays["action"]].min() > 0
    assert (arrays["strategy"] == arrays["roster"][arrays["episode"], arrays["agent"]]).all()
    shares = np.bincount(arrays["split"]) / len(arrays["split"])
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_every_row_is_what_the_game_shows(data):
    """A recorded game, played again in PettingZoo from its seed with the recorded actions, gives the same rows."""
    arrays = data.arrays
    env = StagHunt(max_cycles=18)
    for episode in (0, 1, 7, 30):
        rows = np.flatnonzero(arrays["episode"] == episode)
        by = {(int(arrays["t"][r]), int(arrays["agent"][r])): r for r in rows}
        seen, infos = env.reset(seed=int(arrays["episode_seed"][episode]))
        for t in itertools.count():
            if not env.agents:
                break
            numbers = [int(name.split("_")[1]) for name in env.agents]
            assert all((t, i) in by for i in numbers)
            actions = {f"player_{i}": int(arrays["action"][by[t, i]]) for i in numbers}
            before = seen
            previous = {i: infos[f"player_{i}"]["previous_actions"] for i in numbers}
            seen, rewards, terminated, truncated, infos = env.step(actions)
            for i in numbers:
                row, name = by.pop((t, i)), f"player_{i}"
                assert (arrays["obs"][row] == before[name]["observation"]).all()
                assert (arrays["next_obs"][row] == seen[name]["observation"]).all()
                assert (arrays["action_mask"][row] == before[name]["action_mask"]).all()
                assert (arrays["prev_actions"][row] == previous[i]).all()
                assert (arrays["joint_action"][row] == infos[name]["previous_actions"]).all()
                assert arrays["reward"][row] == np.float32(rewards[name]) == arrays["rewards"][row, 0]
                assert arrays["terminated"][row] == terminated[name] and arrays["truncated"][row] == truncated[name]
                others = [np.float32(rewards.get(f"player_{(i + j) % 4}", 0.0)) for j in range(4)]
                assert arrays["rewards"][row].tolist() == others
        assert not by


def test_a_record_is_a_function_of_its_arguments(data):
    again = collect(6_000, seed=3, games=50)
    assert all((again.arrays[name] == values).all() for name, values in data.arrays.items())
    other = collect(6_000, seed=4)
    assert not (other.arrays["action"] == data.arrays["action"]).all()
    shorter = collect(3_000, seed=3)
    keys = {tuple(key) for key in np.stack([data.arrays[k] for k in ("episode", "agent", "t")], 1).tolist()}
    assert {tuple(key) for key in np.stack([shorter.arrays[k] for k in ("episode", "agent", "t")], 1).tolist()} < keys


def test_the_last_game_is_cut_with_all_players(data):
    arrays = data.arrays
    last = arrays["episode"] == arrays["episode"].max()
    latest = [arrays["t"][last & (arrays["agent"] == i)].max(initial=-1) for i in range(4)]
    assert max(latest) - min(latest) <= 1 or arrays["terminated"][last].any()


@pytest.mark.parametrize("arguments", [{"rows": 0}, {"max_cycles": 0}, {"strategies": ("NX",)}, {"strategies": ()}])
def test_collecting_nonsense_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        collect(**{"rows": 10, **arguments})


# --- what can be known ---
@pytest.mark.parametrize("strategies", [("NS", "NH"), ("NS", "NH", "random")])
def test_posterior_equals_a_loop_over_games(strategies):
    data = collect(800, strategies=strategies, seed=2, epsilon=0.05)
    arrays, k = data.arrays, len(strategies)
    seats, prior = rosters(k, 4)
    posterior = history_posterior(data)
    for episode in range(arrays["episode"].max() + 1):
        weights = prior.copy()
        rows = np.flatnonzero(arrays["episode"] == episode)
        for t in range(arrays["t"][rows].max() + 1):
            now = rows[arrays["t"][rows] == t]
            for row in now:
                agent = arrays["agent"][row]
                wanted = [weights[seats[:, agent] == s].sum() / weights.sum() for s in range(k)]
                assert posterior[row] == pytest.approx(wanted, abs=1e-9)
            for row in now:
                acted = arrays["policy_probs"][row, :, arrays["action"][row]].astype(float)
                weights = weights * acted[seats[:, arrays["agent"][row]]]


def test_posterior_is_calibrated_and_no_ceiling_is_broken():
    data = collect(60_000, seed=5)
    arrays, every = data.arrays, np.arange(60_000)
    posterior = history_posterior(data)
    bins = np.minimum((posterior[:, 0] * 10).astype(int), 9)
    for b in range(10):
        here = bins == b
        if here.sum() > 2_000:
            assert posterior[here, 0].mean() == pytest.approx((arrays["strategy"][here] == 0).mean(), abs=0.05)
    true = arrays["policy_probs"][every, arrays["strategy"]].astype(float)
    mixed = (posterior[:, :, None] * arrays["policy_probs"]).sum(1)
    oracle, history, even = (
        true[every, q.argmax(1)].mean() for q in (true, mixed, arrays["policy_probs"].mean(1))
    )  # fmt: skip
    assert oracle == pytest.approx(0.876, abs=0.006) and history == pytest.approx(0.849, abs=0.008)
    assert oracle > history > even
    assert (posterior.argmax(1) == arrays["strategy"]).mean() == pytest.approx(0.895, abs=0.01)
    nll = -np.log(mixed[every, arrays["action"]]).mean()
    assert nll == pytest.approx(0.26, abs=0.02)
    assert (arrays["action"] == STAY).mean() == pytest.approx(0.343, abs=0.01)


def test_an_observer_who_knows_the_third_script_is_better_where_it_plays_and_ends_up_no_worse_elsewhere():
    data = collect(40_000, strategies=("NS", "NH", "NA"), seed=5)
    arrays, every = data.arrays, np.arange(40_000)
    true = arrays["policy_probs"][every, arrays["strategy"]].astype(float)
    two, three = (history_bayes(data, known, slip=0.01) for known in (("NS", "NH"), ("NH", "NA", "NS")))
    meets = (arrays["roster"] == 2).any(1)[arrays["episode"]]
    hit = [true[every, q.argmax(1)] for q in (two, three)]
    nll = [-(true * np.log(np.where(true > 0, q, 1.0))).sum(1) for q in (two, three)]
    assert hit[1][meets].mean() > hit[0][meets].mean() + 0.005 and nll[1][meets].mean() < nll[0][meets].mean() - 0.02
    assert hit[1][~meets].mean() < hit[0][~meets].mean()  # without NA, whoever does not think of it is right
    gap = np.abs(two - three).sum(1)
    early, late = (gap[~meets & part].mean() for part in (arrays["t"] < 4, arrays["t"] > 14))
    assert late < 0.1 * early
    assert history_bayes(data) == pytest.approx(history_bayes(data, ("NS", "NH", "NA")), abs=1e-12)


def test_slips_are_those_of_the_scripts(data):
    """Who expects slips predicts as one who is told the probabilities of players that slip."""
    legal = data.arrays["action_mask"]
    slipping = 0.9 * data.arrays["policy_probs"] + 0.1 * (legal / legal.sum(1, keepdims=True))[:, None]
    told = Record({**data.arrays, "policy_probs": slipping}, data.meta)
    assert history_bayes(data, slip=0.1) == pytest.approx(history_bayes(told), abs=1e-6)
    assert np.abs(history_bayes(data, slip=0.1) - history_bayes(data)).max() > 0.05


def test_part_of_the_episodes_has_the_same_posterior(data):
    arrays = data.arrays
    chosen = np.isin(arrays["episode"], np.flatnonzero(arrays["split"] == 2))
    part = Record({name: values[chosen] for name, values in arrays.items() if len(values) == 6_000}, data.meta)
    assert history_posterior(part) == pytest.approx(history_posterior(data)[chosen], abs=1e-12)


def test_how_well_a_moving_stag_can_be_told():
    """In a corner it stays with 3/5, amid the board each of five ways has 1/5, next to prey it can go nowhere else."""
    config = Config(size=4, n_players=2, n_stags=1, n_hares=3, stag_moves=True)
    obs = np.zeros((5, 5, 16), np.uint8)
    obs[:, 0, 15] = obs[:, 1, 15] = 1  # both players, except where they hunt or are gone
    obs[[0, 1, 2, 3, 4], 3, [0, 10, 0, 3, 0]] = 1
    obs[2, 4, [1, 4]] = 1  # prey on both ways
    obs[3, :2, 15], obs[3, :2, 3] = 0, 1
    obs[4, 1, 15], obs[4, 2, 1] = 0, 1  # one player gone, an obstacle on one way
    actions = np.array([[STAY, STAY], [STAY, STAY], [STAY, STAY], [HUNT_STAG, HUNT_STAG], [STAY, -1]])
    shares = commonest_shares(obs.reshape(5, 5, 4, 4), actions, config, draws=500)
    assert shares[[0, 1, 4]] == pytest.approx([0.6, 0.2, 0.8], abs=0.06) and (shares[[2, 3]] == 1.0).all()
    still = commonest_shares(obs.reshape(5, 5, 4, 4), actions, config._replace(stag_moves=False), draws=3)
    assert (still == 1.0).all()


# --- pictures, speed ---
def test_pictures_show_the_state():
    env = at([9, 9, 20, GONE], stags=(9,), hares=(20, 21, GONE, 53), render_mode="rgb_array")
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.ndim == 3 and not np.array(picture.shape[:2]) @ [1, 1] % 16
    act(env, RIGHT, STAY, HUNT_HARE, STAY)
    after = env.render()
    assert (after != picture).mean() > 0.01
    text = at([9, 9, 20, GONE], stags=(9,), hares=(20, 21, GONE, 53), render_mode="ansi").render()
    lines = text.splitlines()
    assert len(lines) == 9 and lines[1].split() == [".", "S01", *"......"] and lines[2].split()[4:6] == ["h2", "h"]
    assert text.count("#") == 0 and lines[-1] == "step 0 of 35"


def test_the_vectorised_game_is_fast():
    """At least 100,000 environment steps a second with the scripted policies, on a quiet core; here half of it."""
    rates = []
    for attempt in range(3):
        games, steps = VectorStagHunt(Config(), np.arange(2_048) + attempt), 0
        roster = np.random.default_rng(0).integers(2, size=(2_048, 4, 1, 1))
        start = time.process_time()
        for _ in range(18):
            steps += int(games.alive.any(1).sum())
            legal = games.legal()
            probabilities = games.policy_probabilities(("NS", "NH"), legal)
            games.step(games.sample(np.take_along_axis(probabilities, roster, 2)[:, :, 0]), legal)
        rates.append(steps / (time.process_time() - start))
    assert max(rates) > 50_000


def test_a_record_is_played_again():
    data = collect(200, Config(size=4), max_cycles=7, seed=3)
    arrays, last = data.arrays, len(data.arrays["split"]) - 1
    seen = {0: [], last: []}
    pictures = list(replay(data, 0, lambda row: seen[0].append(row) or f"row {row}"))
    assert sorted(seen[0]) == np.flatnonzero(arrays["episode"] == 0).tolist()
    assert len(pictures) == arrays["t"][arrays["episode"] == 0].max() + 1
    boards, captions = np.split(np.stack(pictures), [-16 * 5], axis=1)
    env = StagHunt(**data.meta["env_kwargs"], render_mode="rgb_array")
    env.reset(seed=int(arrays["episode_seed"][0]))
    assert np.array_equal(boards[0], env.render()) and not np.array_equal(boards[0], boards[-1])
    assert all(0 < (caption < 128).mean() < 0.2 for caption in captions)  # something is written there
    list(replay(data, last, lambda row: seen[last].append(row) or ""))  # this one is cut
    assert 0 <= (arrays["episode"] == last).sum() - len(seen[last]) < 4


def test_eight_symmetries_make_a_group():
    cells, becomes = symmetries(3)
    assert cells[0].tolist() == list(range(9)) and becomes[0].tolist() == list(range(7))
    assert len(np.unique(cells, axis=0)) == len(np.unique(becomes, axis=0)) == 8
    assert (becomes[:, 4:] == [4, 5, 6]).all() and (np.sort(becomes, 1) == range(7)).all()
    pairs = {tuple(cells[i][cells[j]]) for i in range(8) for j in range(8)}
    assert pairs == {tuple(turn) for turn in cells}
    for turn, moved in zip(cells, becomes, strict=True):  # a step, then a turn, or the other way round
        for action, (row, column) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            place = turn.tolist().index(4 + 3 * row + column)
            assert place == 4 + 3 * STEPS[moved[action]][0] + STEPS[moved[action]][1]
