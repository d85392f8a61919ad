"""What the virtual cluster learns, against the same mathematics written out."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from esync import config
from esync.config import RunConfig
from esync.data import partition
from esync.messages import Query
from esync.sim.cluster import virtual_cluster
from esync.sim.learner import Learner, LearningTrainee, run_steps
from esync.worker.pytree import Packer
from esync.worker.step import random_key
from tests.virtual import Untrained, compiled_once, done

WORKERS, ROUNDS = 3, 12
RUN = RunConfig(
    mode="sync",
    dataset="digits",
    model="cnn",
    lr=0.1,
    batch_size=16,
    workers=WORKERS,
    rounds=ROUNDS,
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def learner():
    made = Learner(RUN, say=lambda text: None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def dense():
    run = dataclasses.replace(RUN, model="mlp", optimizer="momentum")
    made = Learner(run, say=lambda text: None)
    yield made
    made.close()


def by_hand(learner, rank):
    """params -> params after the next local step of a rank's worker, one step after the other."""
    run, model = learner.config, learner.model
    batches = partition.batches(learner.parts[rank], run.batch_size, run.seed, rank)
    key = jax.random.fold_in(random_key(run.seed), rank)
    count, state = 0, model.init_optimizer(model.params)

    def step(params):
        nonlocal count, state
        batch = (*learner.train_set, next(batches), key, count, params)
        params, _, state, _ = model.step(params, {}, state, *batch)
        count += 1
        return params

    return step


def after(step, steps, params):
    for _ in range(steps):
        params = step(params)
    return params


def flat(learner, params):
    return learner.packer.pack(params, learner.model.stats)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_mode_sync_is_the_average_of_everybody_s_gradient(learner):
    cluster = virtual_cluster(
        config.cluster(
            {
                "workers": [
                    {"name": "fast", "count": 2, "step_time_s": 0.1, "jitter": 0.3},
                    {"name": "slow", "step_time_s": 1.0},
                ]
            },
            {name: getattr(RUN, name) for name in ("mode", "rounds", "batch_size")},
        ),
        learner,
    )
    while cluster.state.stopped is None:
        cluster.step()
    params = learner.model.params
    steps = [by_hand(learner, rank) for rank in range(WORKERS)]
    for _ in range(ROUNDS):
        gradients = [
            jax.tree.map(lambda before, after: before - after, params, step(params))
            for step in steps
        ]
        params = jax.tree.map(lambda w, *g: w - sum(g) / WORKERS, params, *gradients)
    assert cluster.server.version == ROUNDS
    close(np.concatenate(cluster.server.chunks), flat(learner, params))
    assert np.abs(flat(learner, params) - learner.initial()).max() > 0.01


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_the_compiled_loop_of_steps_is_the_same_as_step_by_step(dense, steps):
    trainee, step = dense.trainee(1), by_hand(dense, 1)
    trainee.adopt([dense.initial()])
    trainee.train(steps, 1.0)
    update, loss = trainee.push(go_on=False).result()
    params = after(step, steps, dense.model.params)
    assert dense._loops(dense.model)
    close(update, flat(dense, params) - dense.initial())
    assert loss > 0


@pytest.mark.parametrize("loops", [False, True])
def test_every_step_of_a_round_has_its_number_for_dropout_and_its_own_batch(loops):
    """Steps 7, 8 and 9, of one sample each."""

    def step(params, stats, state, images, labels, index, key, count, anchor):
        return params + 100 * count + images[index].sum(), stats, state, params

    run = run_steps(SimpleNamespace(step=step), loops)
    batches = [np.array([i], np.int32) for i in (2, 0, 1)]
    images = np.array([10.0, 20.0, 40.0], np.float32)
    params, _, _, loss = run(np.float32(0), 0.0, 0.0, images, None, batches, None, 7, None)
    assert float(params) == 700 + 40 + 800 + 10 + 900 + 20
    assert float(loss) == 700 + 40 + 800 + 10, "the last step's loss"


def test_convolutions_are_stepped_one_by_one_unless_they_are_tiny(learner):
    assert not learner._loops(learner.model)
    tiny = Learner.__new__(Learner)
    tiny.__dict__.update(learner.__dict__, config=dataclasses.replace(RUN, batch_size=1))
    assert tiny._loops(learner.model)


def test_a_worker_goes_on_where_its_batches_and_its_optimiser_were(dense):
    """Momentum and the place in the data are the worker's own, whatever model it takes up."""
    trainee, step = dense.trainee(0), by_hand(dense, 0)
    for base in (dense.initial(), dense.initial() / 2):
        trainee.adopt([base])
        trainee.train(3, 1.0)
        update, _ = trainee.push(go_on=False).result()
        params = after(step, 3, dense.packer.unpack([base])[0])
    close(update, flat(dense, params) - dense.initial() / 2)


def test_a_round_that_ended_without_a_worker_was_trained_all_the_same(dense):
    """Its batches are used up, as on a real worker; of models that it did not train from only the last one counts."""
    trainee, step = dense.trainee(2), by_hand(dense, 2)
    trainee.adopt([dense.initial() * 3])
    trainee.adopt([dense.initial()])
    trainee.train(2, 1.0)
    trainee.adopt([dense.initial() / 2])
    trainee.train(1, 1.0)
    update, _ = trainee.push(go_on=False).result()
    after(step, 2, dense.model.params)
    params = step(dense.packer.unpack([dense.initial() / 2])[0])
    close(update, flat(dense, params) - dense.initial() / 2)


# Overlap


def test_a_merge_adds_the_progress_since_the_push_to_the_new_model(dense):
    """new local = new global + (local now - local at push); the next delta is relative to the new global."""
    start, new = dense.initial(), dense.initial() * np.float32(0.9)
    trainee, step = dense.trainee(0), by_hand(dense, 0)
    trainee.adopt([start])
    trainee.train(2, 1.0)
    first = trainee.push(go_on=True)
    trainee.train(3, 1.0)
    trainee.merge([new])
    trainee.train(1, 1.0)
    second = trainee.push(go_on=True)

    params = after(step, 2, dense.model.params)
    at_push = flat(dense, params)
    now = flat(dense, after(step, 3, params))
    merged = new + (now - at_push)
    local = flat(dense, step(dense.packer.unpack([merged])[0]))
    close(first.result()[0], at_push - start)
    close(second.result()[0], local - new)


def counting_learner():
    """One whose local step adds 1 to the parameter and 10 to the statistic, in NumPy."""

    class Inline:
        def submit(self, work):
            return done(work())

    def steps(params, stats, state, images, labels, indices, key, first, anchor):
        add = len(indices)
        began_at.append(first)
        return {"w": params["w"] + add}, {"m": stats["m"] + 10 * add}, state, 0.5

    def unpacked(chunks):
        taken_up.append(chunks[0].tolist())
        return packer.unpack(chunks)

    taken_up, began_at = [], []
    packer = Packer({"w": np.zeros(1, np.float32)}, {"m": np.zeros(1, np.float32)})
    return SimpleNamespace(
        config=RunConfig(batch_size=1),
        parts=[np.arange(4)],
        model=SimpleNamespace(params=None, init_optimizer=lambda params: ()),
        packer=packer,
        taken_up=taken_up,
        began_at=began_at,
        unpacked=unpacked,
        steps=steps,
        train_set=(None, None),
        pool=Inline(),
    )


def test_the_statistics_that_are_pushed_are_a_worker_s_own_even_if_it_has_just_merged():
    """Deltas of w and values of m, by hand. The merged model has the new model's statistics."""
    learner = counting_learner()
    trainee = LearningTrainee(learner, 0)
    trainee.adopt([np.array([100, 1000], np.float32)])
    trainee.train(2, 1.0)
    assert trainee.push(go_on=True).result()[0].tolist() == [2, 1020]
    trainee.train(3, 1.0)
    trainee.merge([np.array([200, 2000], np.float32)])
    assert trainee.push(go_on=True).result()[0].tolist() == [3, 1050]
    trainee.train(4, 1.0)
    trainee.merge([np.array([300, 3000], np.float32)])
    trainee.train(1, 1.0)
    assert trainee.push(go_on=True).result()[0].tolist() == [5, 3010]
    assert learner.began_at == [0, 2, 5, 9], "the worker's steps are numbered throughout"


def test_of_models_that_a_worker_does_not_train_from_only_the_last_is_taken_up():
    """One that is not drawn for many rounds costs no arithmetic, and keeps no model but the newest."""
    learner = counting_learner()
    trainee = LearningTrainee(learner, 0)
    for version in range(5):
        trainee.adopt([np.array([version, 0], np.float32)])
    trainee.train(1, 1.0)
    trainee.push(go_on=False)
    assert learner.taken_up == [[4, 0]]


class Noted(Untrained):
    """Every worker's model, of which is noted what is to be done to it."""

    def __init__(self):
        self.notes = {}

    def trainee(self, rank):
        trainee = Noted()
        trainee.notes = self.notes.setdefault(rank, [])
        return trainee

    def adopt(self, chunks):
        self.notes.append(("adopt", float(chunks[0][0])))

    def train(self, steps, width):
        self.notes += ["train"] * steps

    def push(self, *, go_on):
        self.notes.append("push and go on" if go_on else "push")
        return super().push(go_on=go_on)

    def merge(self, chunks):
        self.notes.append(("merge", float(chunks[0][0])))


def notes_of_two_equal_workers(watch=lambda sender, message: None, **run):
    """Steps of 1 s; the way to the server and back takes 2.5 s; each update adds 1 to the model.

    In the first round a second step runs already when the first one has been measured.
    """
    lessons = Noted()
    file = {
        "workers": [{"count": 2, "step_time_s": 1.0, "bandwidth_mbit": 8}],
        "network": {"model_mb": 1.25},
        "run": {"rounds": 4, **run},
    }
    virtual_cluster(config.cluster(file), lessons, watch=watch).run()
    return lessons.notes


def test_a_worker_that_overlaps_trains_until_the_model_is_there_and_merges_it_after_that_step():
    notes = notes_of_two_equal_workers(overlap=True)
    away = ["train", "train", "train"]
    expected = [("adopt", 0.0), "train", "train", "push and go on"]
    for version in (1.0, 2.0, 3.0):
        expected += [*away, ("merge", version), "push and go on"]
    assert notes[0] == notes[1] == [*expected, "train"]


def test_a_worker_that_does_not_overlap_takes_up_the_model_instead():
    notes = notes_of_two_equal_workers()
    expected = [("adopt", 0.0), "train", "train", "push"]
    for version in (1.0, 2.0, 3.0):
        expected += [("adopt", version), "train", "push"]
    assert notes[0] == notes[1] == expected


def test_a_worker_that_overlaps_and_may_do_only_two_steps_waits_for_the_model_and_merges_it():
    notes = notes_of_two_equal_workers(overlap=True, max_steps=2)
    expected = [("adopt", 0.0), "train", "train", "push and go on"]
    for version in (1.0, 2.0, 3.0):
        expected += ["train", "train", ("merge", version), "push and go on"]
    assert notes[0] == notes[1] == [*expected, "train"]


def test_a_worker_that_overlaps_asks_when_the_model_arrives_and_says_how_long_its_step_runs():
    """The model is there 2.5 s after the push, in the middle of the third step since."""
    queries = []

    def watch(sender, message):
        if isinstance(message, Query) and message.round > 0:
            queries.append((message.round, message.step, message.ahead, message.running_s))

    notes_of_two_equal_workers(watch, overlap=True)
    assert queries == [(version, 2, 1, 0.5) for version in (1, 2, 3) for _ in range(2)]
