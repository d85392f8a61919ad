"""The configuration: what is accepted, and what a slip is answered with."""

from __future__ import annotations

import dataclasses
import importlib

import click
import pytest
from click.testing import CliRunner

from esync import cli, config
from esync.algorithms import ALGORITHMS, PRESETS, Algorithm
from esync.config import (
    ClusterConfig,
    PsConfig,
    RunConfig,
    StateConfig,
    WorkerConfig,
    build,
    check_names,
    cluster,
    read,
)
from esync.errors import ConfigError


def error(call, *args, **options):
    with pytest.raises(ConfigError) as caught:
        call(*args, **options)
    return str(caught.value)


def test_an_empty_file_is_a_run_with_one_worker():
    made = cluster({})
    assert made == ClusterConfig(RunConfig(), StateConfig(), PsConfig(), (WorkerConfig(),))
    assert made.run.workers == 1
    assert [w.name for w in made.each_worker()] == ["worker0"]


def test_a_cluster_file_is_read_table_by_table(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(
        """
        [run]
        mode = "sync"
        lr = 1            # a whole number will do
        [state]
        bind = "tcp://127.0.0.1:*"
        [ps]
        device = "cuda:1"
        [[workers]]
        name = "gpu"
        count = 2
        [[workers]]
        slowdown = 30.0
        """
    )
    made = cluster(read(path), {"lr": 0.5, "rounds": 7})
    assert (made.run.mode, made.run.lr, made.run.rounds) == ("sync", 0.5, 7)
    assert made.run.workers == 3
    assert made.state.bind == "tcp://127.0.0.1:*"
    assert made.ps.device == "cuda:1"
    assert [w.name for w in made.each_worker()] == ["gpu-0", "gpu-1", "worker1"]
    assert [w.slowdown for w in made.each_worker()] == [1.0, 1.0, 30.0]
    assert all(w.count == 1 for w in made.each_worker())


def test_the_run_may_begin_with_fewer_workers_than_the_file_lists():
    made = cluster({"run": {"workers": 1}, "workers": [{"count": 3}]})
    assert made.run.workers == 1
    assert len(made.each_worker()) == 3


def test_a_file_that_is_missing_is_named(tmp_path):
    text = error(read, tmp_path / "nowhere.toml")
    assert "nowhere.toml" in text
    assert "No such file" in text


def test_a_syntax_error_is_shown_with_its_line(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text("[run]\nmode = esync\n")
    text = error(read, path)
    assert "not valid TOML" in text
    assert "line 2" in text


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cluster.toml" in error(read, path)


def test_an_unknown_key_is_answered_with_the_closest_one():
    text = error(cluster, {"run": {"batchsize": 3}})
    assert "[run]" in text
    assert "'batchsize'" in text
    assert "Did you mean 'batch_size'?" in text
    assert "Did you mean 'slowdown'?" in error(cluster, {"workers": [{"slow_down": 2.0}]})


def test_an_unknown_table_is_answered_with_the_closest_one():
    assert "Did you mean 'workers'?" in error(cluster, {"worker": [{}]})


@pytest.mark.parametrize("table", ["run", "state", "ps"])
def test_a_table_that_is_no_table_is_refused(table):
    assert f"[{table}]: expected a table" in error(cluster, {table: 5})


@pytest.mark.parametrize("groups", [[], {}, {"name": "a"}, "a", 3])
def test_workers_that_are_no_list_of_tables_are_refused(groups):
    assert "[[workers]]" in error(cluster, {"workers": groups})


def test_workers_that_are_a_list_of_something_else_are_refused():
    assert "expected a table, got 'gpu'" in error(cluster, {"workers": ["gpu"]})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lr", "fast", "float"),
        ("lr", True, "float"),
        ("lr", None, "float"),
        ("batch_size", 6.5, "int"),
        ("batch_size", True, "int"),
        ("batch_size", "64", "int"),
        ("model", 3, "str"),
        ("mode", ["esync"], "str"),
        ("dcasgd", 1, "bool"),
        ("dcasgd", "yes", "bool"),
        ("seed", [1], "int"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(key, value, expected):
    text = error(cluster, {"run": {key: value}})
    assert f"run.{key}: expected {expected}" in text
    assert repr(value) in text


@pytest.mark.parametrize(
    ("key", "value", "side"),
    [
        ("batch_size", 0, "below 1"),
        ("lr", -0.1, "below 0"),
        ("workers", 0, "below 1"),
        ("workers", 100_001, "above 100000"),
        ("chunk_mib", -1, "below 0"),
        ("chunk_mib", 65, "above 64"),
        ("target_accuracy", 1.5, "above 1"),
        ("heartbeat_s", 0.05, "below 0.1"),
        ("heartbeat_s", 3601, "above 3600"),
        ("rounds", -1, "below 0"),
        ("duration_s", -1.0, "below 0"),
        ("epsilon_s", -2.0, "below -1"),
        ("image_size", 5000, "above 4096"),
        ("seed", -1, "below 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_bound(key, value, side):
    text = error(cluster, {"run": {key: value}})
    assert f"run.{key}" in text
    assert side in text


@pytest.mark.parametrize(
    "key",
    [item.name for item in dataclasses.fields(RunConfig) if item.type == "float"],
)
def test_no_number_of_a_run_may_be_nan(key):
    assert f"run.{key}" in error(build, RunConfig, {key: float("nan")}, "run")


@pytest.mark.parametrize(("key", "value"), [("step_time_s", float("nan")), ("slowdown", 0.5)])
def test_a_worker_s_pace_is_checked(key, value):
    assert f"workers.{key}" in error(cluster, {"workers": [{key: value}]})


@pytest.mark.parametrize(
    ("key", "slip", "meant"),
    [
        ("mode", "easync", "esync"),
        ("policy", "papers", "paper"),
        ("split", "by_class", "by-class"),
        ("optimizer", "adams", "adam"),
        ("weights", "equals", "equal"),
    ],
)
def test_a_choice_that_there_is_not_is_answered_with_the_closest_one(key, slip, meant):
    text = error(cluster, {"run": {key: slip}})
    assert f"run.{key}" in text
    assert f"Did you mean {meant!r}?" in text


def test_two_workers_of_one_name_are_refused():
    made = cluster({"workers": [{"name": "a"}, {"name": "b"}, {"name": "a"}]})
    assert "two workers are named 'a'" in error(made.each_worker)
    made = cluster({"workers": [{"name": "a", "count": 2}, {"name": "a-1"}]})
    assert "'a-1'" in error(made.each_worker)


def test_mode_local_takes_one_worker_of_however_many_the_file_has():
    made = cluster({"run": {"mode": "local"}, "workers": [{"name": "a", "count": 3}, {}]})
    assert made.run.workers == 1
    assert [w.name for w in made.each_worker()] == ["a-0"]
    assert "workers = 1, not 2" in error(RunConfig, mode="local", workers=2)


def test_where_the_number_of_steps_is_fixed_the_run_may_say_it():
    assert RunConfig(mode="local").steps_per_round == 50
    assert RunConfig(mode="local", local_steps=7).steps_per_round == 7
    assert RunConfig(mode="sync").steps_per_round == 1
    assert RunConfig(mode="sync", local_steps=7).steps_per_round == 7


GPU, SERVER = {"device": "gpu"}, {"device": "cuda"}


@pytest.mark.parametrize(
    ("ps", "workers", "run", "mib"),
    [
        (SERVER, [GPU | {"count": 8}], {}, 32),
        ({"device": "cuda:0"}, [GPU, {"name": "b", "device": "gpu:0"}], {}, 32),
        ({"device": "cuda:1"}, [{"device": "gpu:1"}], {}, 32),
        (SERVER, [GPU], {"chunk_mib": "auto"}, 32),
        (SERVER, [GPU], {"chunk_mib": 8}, 8),
        (SERVER, [GPU, {"name": "b"}], {}, 4),
        (SERVER, [GPU | {"host": "other"}], {}, 4),
        (SERVER, [{"device": "gpu:1"}], {}, 4),
        ({"device": "cuda:1"}, [GPU], {}, 4),
        ({}, [GPU | {"count": 8}], {}, 2),
        (SERVER, [GPU], {"shared_memory": False}, 4),
        (SERVER, [GPU], {"compression": "int8"}, 4),
        (SERVER, [GPU], {"mode": "async"}, 4),
    ],
    ids=str,
)
def test_chunks_are_largest_where_all_is_on_one_gpu(ps, workers, run, mib):
    assert config.cluster({"run": run, "ps": ps, "workers": workers}).run.mib_per_chunk == mib


def test_workers_ask_and_wait_only_where_the_paper_s_policy_is_used():
    assert not RunConfig(mode="esync", policy="paper").nonblocking
    assert RunConfig(mode="esync", policy="adaptive").nonblocking
    assert RunConfig(mode="sync", policy="paper").nonblocking


def test_dcasgd_needs_mode_async_plain_sgd_and_a_learning_rate():
    assert RunConfig(mode="async", dcasgd=True).dcasgd
    assert 'mode = "async"' in error(RunConfig, mode="esync", dcasgd=True)
    assert 'optimizer = "sgd"' in error(RunConfig, mode="async", optimizer="adam", dcasgd=True)
    assert "learning rate above 0" in error(RunConfig, mode="async", lr=0.0, dcasgd=True)


@pytest.mark.parametrize("device", ["cpu", "gpu", "gpu:0", "gpu:12"])
def test_devices_are_spelled_cpu_gpu_and_gpu_n(device):
    assert WorkerConfig(device=device).device == device


@pytest.mark.parametrize("device", ["", "cuda", "cpu:0", "gpu:x", "gpu:-1", "GPU", "gpu 0"])
def test_another_device_is_refused_with_the_spelling(device):
    assert "expected cpu, gpu or gpu:N" in error(WorkerConfig, device=device)


@pytest.mark.parametrize("mode", list(ALGORITHMS))
def test_a_run_travels_in_a_welcome_and_comes_out_the_same(mode):
    run = RunConfig(mode=mode, lr=0.25, target_accuracy=0.9, seed=2**40)
    assert build(RunConfig, run.to_wire(), "run") == run


def test_a_configuration_from_another_version_is_refused_by_name():
    assert "'warp_factor'" in error(build, RunConfig, {"warp_factor": 9}, "run")
    assert "[run]" in error(build, RunConfig, {3: 4}, "run")
    assert "expected a table" in error(build, RunConfig, None, "run")


def test_a_model_or_data_set_that_there_is_not_is_answered_with_the_closest_one():
    check_names(RunConfig())
    check_names(RunConfig(model="own", dataset="mine"))
    assert "Did you mean 'cnn'?" in error(check_names, RunConfig(model="cnnn"))
    assert "Did you mean 'cifar10'?" in error(check_names, RunConfig(dataset="cifar-10"))


# Presets, and words in the place of numbers


def test_a_preset_sets_what_belongs_together():
    run = cluster({"run": {"preset": "paper"}}).run
    assert (run.preset, run.mode, run.policy) == ("paper", "esync", "paper")
    assert run == RunConfig(preset="paper", mode="esync", policy="paper")


def test_what_is_set_besides_a_preset_takes_precedence(monkeypatch):
    monkeypatch.setitem(PRESETS, "slow", {"lr": 0.5, "rounds": 9, "batch_size": 8})
    in_the_file = {"run": {"preset": "slow", "lr": 0.25}}
    run = cluster(in_the_file).run
    assert (run.lr, run.rounds, run.batch_size) == (0.25, 9, 8)
    run = cluster(in_the_file, {"rounds": 3}).run
    assert (run.lr, run.rounds, run.batch_size) == (0.25, 3, 8)


def test_a_preset_on_the_command_line_takes_precedence_over_the_file_and_over_its_preset(
    monkeypatch,
):
    monkeypatch.setitem(PRESETS, "slow", {"lr": 0.5, "rounds": 9, "batch_size": 8})
    in_the_file = {"run": {"lr": 0.25, "seed": 4}}
    run = cluster(in_the_file, {"preset": "slow", "rounds": 3}).run
    assert (run.lr, run.rounds, run.batch_size, run.seed) == (0.5, 3, 8, 4)
    run = cluster({"run": {"preset": "fast", "seed": 4}}, {"preset": "paper"}).run
    assert run == RunConfig(preset="paper", policy="paper", seed=4), "nothing is left of fast"


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_run_and_survives_the_journey_to_the_workers(name):
    run = cluster({"run": {"preset": name}}).run
    assert build(RunConfig, run.to_wire(), "run") == run
    assert run != RunConfig(preset=name), "it sets something"


def test_a_preset_that_there_is_not_is_answered_with_the_closest_one():
    text = error(cluster, {"run": {"preset": "papers"}})
    assert "run.preset: unknown preset 'papers'. Did you mean 'paper'? Known: " in text


@pytest.mark.parametrize("value", [["paper"], 3, {"paper": 1}])
def test_a_preset_that_is_no_name_is_refused(value):
    assert "run.preset: expected str" in error(cluster, {"run": {"preset": value}})


def test_min_steps_may_be_left_to_the_policy(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text('[run]\nmin_steps = "auto"\n')
    run = cluster(read(path)).run
    assert run.min_steps == 0
    assert build(RunConfig, run.to_wire(), "run") == run
    assert cluster({"run": {"min_steps": 7}}).run.min_steps == 7


def test_another_word_in_the_place_of_a_number_is_refused_with_the_one_that_there_is():
    text = error(cluster, {"run": {"min_steps": "often"}})
    assert text == "run.min_steps: expected int or 'auto', got 'often'"
    assert "expected int, got 'auto'" in error(cluster, {"run": {"rounds": "auto"}})


@pytest.mark.parametrize(
    "options", [{"mode": "sync"}, {"policy": "paper"}, {"mode": "fedavg", "policy": "adaptive"}]
)
@pytest.mark.parametrize("wanted", [{"overlap": True}, {"min_steps": 3}, {"min_steps": "auto"}])
def test_what_only_the_adaptive_policy_can_do_is_refused_elsewhere(options, wanted):
    text = error(cluster, {"run": {**options, **wanted}})
    (key,) = wanted
    assert f'{key} needs mode = "esync" and policy = "adaptive"' in text


@pytest.mark.parametrize("outer", ["momentum", "nesterov", "adam"])
def test_an_outer_optimiser_needs_rounds_that_are_averaged(outer):
    assert RunConfig(mode="fedavg", outer=outer).outer == outer
    assert "mode async has none" in error(RunConfig, mode="async", outer=outer)


def test_numbers_that_do_not_go_together_are_refused():
    assert "mode async has none" in error(RunConfig, mode="async", weights="samples")
    assert "more than the workers = 3" in error(RunConfig, workers=3, min_workers=4)


def test_workers_ask_first_where_a_policy_may_hold_them():
    asking = {mode for mode in ALGORITHMS if RunConfig(mode=mode).asks_first}
    assert asking == {"ssp", "fedavg", "tifl", "feddrop"}
    assert not any(RunConfig(mode=mode).nonblocking for mode in asking)


def test_a_mode_that_is_added_to_the_table_is_a_choice(monkeypatch):
    assert "unknown mode 'mine'" in error(RunConfig, mode="mine")
    monkeypatch.setitem(ALGORITHMS, "mine", Algorithm("fixed", "mean", "mine", local_steps=3))
    assert RunConfig(mode="mine").steps_per_round == 3
    assert "unknown mode 'nine'. Did you mean 'mine'?" in error(RunConfig, mode="nine")


def invoked(command, *arguments):
    """What a command line printed, and the exit status."""
    result = CliRunner().invoke(command, list(arguments), env={"COLUMNS": "80"})
    return result.output, result.exit_code


@click.command()
@cli.options_of(RunConfig)
def parsed(**values):
    """A command with the options of a run; prints what was given."""
    click.echo(repr(cli.given(values, RunConfig)))


def test_words_and_presets_are_options_of_the_command_line():
    assert invoked(parsed, "--min-steps", "auto") == ("{'min_steps': 0}\n", 0)
    assert invoked(parsed, "--min-steps", "4", "--overlap") == (
        "{'min_steps': 4, 'overlap': True}\n",
        0,
    )
    assert invoked(parsed, "--preset", "paper") == ("{'preset': 'paper'}\n", 0)
    assert invoked(parsed) == ("{}\n", 0), "what is not given is the file's, or the default"
    for arguments, word in (
        (("--min-steps", "often"), "'often' is not"),
        (("--preset", "papers"), "'papers' is not"),
        (("--mode", "easync"), "'easync' is not"),
    ):
        text, status = invoked(parsed, *arguments)
        assert status == 2
        assert word in text


@pytest.mark.parametrize("module", ["esync.state.cli", "esync.run.cli"])
def test_the_help_names_every_option_its_values_and_its_default(module):
    text, status = invoked(importlib.import_module(module).main, "--help")
    assert status == 0
    words = " ".join(text.split())
    for item in dataclasses.fields(RunConfig):
        flag = cli.flag_of(item.name)
        assert f" {flag} " in words or f" {flag}/--no-" in words or f" {flag}/" in words, flag
        assert " ".join(item.metadata["help"].split()) in words, flag
    assert "--min-steps AUTO|INTEGER" in words
    assert f"--preset [{'|'.join(PRESETS)}]" in words
    assert "|".join(ALGORITHMS) in words


def test_every_option_has_help_and_a_default_that_passes_its_own_check():
    for cls in (RunConfig, StateConfig, PsConfig, WorkerConfig):
        config.check_fields(cls(), cls.__name__)
        for item in dataclasses.fields(cls):
            assert item.metadata["help"].endswith("."), item.name
            assert config.option_type(cls, item.name) in (int, float, str, bool)


def test_the_global_learning_rate_is_one_by_itself_and_less_with_adam_outside():
    assert RunConfig().outer_lr == 1.0
    assert RunConfig(outer="adam").outer_lr == 0.01, "it moves each number by that much"
    assert RunConfig(outer="adam", global_lr=1.0).outer_lr == 1.0
    assert RunConfig(global_lr=0.0).outer_lr == 0.0
    for wrong in (1e39, -0.5, -2.0):
        with pytest.raises(ConfigError, match="global_lr"):
            RunConfig(global_lr=wrong)


@pytest.mark.parametrize("preset", ["fast", "skewed"])
def test_a_preset_s_global_learning_rate_is_its_own_optimiser_s(preset):
    def rate(table, **overrides):
        return config.cluster({"run": table, "workers": [{}]}, overrides).run.outer_lr

    own = PRESETS[preset]["global_lr"]
    assert rate({"preset": preset}) == rate({"preset": preset, "outer": "nesterov"}) == own
    assert rate({"preset": preset, "outer": "adam"}) == 0.01
    assert (
        rate({"preset": preset}, outer="adam")
        == rate({"outer": "adam"}, preset=preset, outer="adam")
        == 0.01
    )
    assert rate({"preset": preset, "outer": "adam"}, global_lr=0.1) == 0.1
