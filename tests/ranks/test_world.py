"""A process's place, from what its launcher says."""

import pytest

from aura_dist.errors import ConfigError
from aura_dist.ranks.world import Place, first_host, place_from_environment

STEP = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}  # fmt: skip


def test_single_process():
    assert place_from_environment({}) == Place(0, 1, 0)


def test_batch_script_of_an_allocation_is_a_single_process():
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert place_from_environment(batch) == Place(0, 1, 0)


def test_torchrun():
    env = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", **STEP}
    assert place_from_environment(env) == Place(3, 8, 3), "torchrun within a Slurm step is torchrun"


def test_slurm_step_finds_where_to_meet():
    env = dict(STEP)
    assert place_from_environment(env) == Place(5, 8, 1)
    assert env["MASTER_ADDR"] == "gpu07"
    assert 12_000 <= int(env["MASTER_PORT"]) < 32_000
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("5", "8", "1")


def test_own_meeting_place_stands():
    env = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    place_from_environment(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("gpu[07-09,12],login", "gpu07"), ("a-b[3,5]-x", "a-b3-x")],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_number_that_is_none():
    with pytest.raises(ConfigError, match="RANK: expected a number, as the launcher sets it, got 'x'"):
        place_from_environment({"RANK": "x", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    "env",
    [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}, {**STEP, "SLURM_PROCID": "8"}],
)
def test_rank_that_the_launch_does_not_have(env):
    with pytest.raises(ConfigError, match=r"expected a rank .* below the number of ranks, [028], got [028]"):
        place_from_environment(dict(env))


TYPED = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "40000"}


@pytest.mark.parametrize("task", [None, "1", "not a number", "999999999"])
def test_command_typed_in_the_shell_of_a_step_of_several_tasks_is_refused(task):
    with pytest.raises(ConfigError, match=r"each of the 8 tasks of the Slurm step.*RANK=0 WORLD_SIZE=1"):
        place_from_environment({**TYPED, **({"SLURM_TASK_PID": task} if task else {})})


def test_what_srun_starts_itself_in_a_terminal_is_a_rank():
    import os

    assert place_from_environment({**TYPED, "SLURM_TASK_PID": str(os.getpid())}) == Place(0, 8, 0)


def test_typed_command_runs_alone_as_the_error_says():
    assert place_from_environment({**TYPED, "RANK": "0", "WORLD_SIZE": "1"}) == Place(0, 1, 0)


def test_step_of_one_task_and_shell_of_an_allocation_are_single_processes():
    assert place_from_environment({**TYPED, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}) == Place(0, 1, 0)
    assert place_from_environment({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}) == Place(0, 1, 0)
