"""Checkpoints reach the Hub while training goes on, and no fault reaches the training."""

from __future__ import annotations

import logging
import shutil
import threading
import time

import pytest
from hub_faults import AnswerStatus, CutUpload, Fault, LoseAnswer
from hub_server import Exchange
from huggingface_hub import HfApi

from diffusers_dtr.training.run.sharing import BackgroundPush


REPO = "owner/digits"
COMMIT = {"method": "POST", "path": "/commit/"}


class Hold(Fault):
    """The request waits until the test lets it go."""

    def __init__(self, **matching):
        super().__init__(**matching)
        self.reached, self.released = threading.Event(), threading.Event()

    def play(self, exchange: Exchange) -> None:
        body = exchange.read()
        self.reached.set()
        assert self.released.wait(60)
        exchange.send(exchange.answer(body))


@pytest.fixture
def hold(hub):
    """The first commit is held up until `hold.released` is set."""
    hub.faults.append(Hold(**COMMIT))
    yield hub.faults[0]
    hub.faults[0].released.set()


@pytest.fixture
def output_dir(tmp_path):
    (tmp_path / "digits").mkdir()
    return tmp_path / "digits"


@pytest.fixture
def quick(monkeypatch):
    """Pauses between attempts that are short enough to test, and the client's own."""
    wait_for = threading.Condition.wait_for
    monkeypatch.setattr(
        threading.Condition,
        "wait_for",
        lambda self, predicate, timeout=None: wait_for(self, predicate, None if timeout is None else timeout / 200),
    )


def checkpoint(output_dir, step, files=("training_state.json", "transformer/model.safetensors")):
    folder = output_dir / f"checkpoint-{step}"
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"{path} of step {step}")
    return folder, step


def files(hub):
    return {path: data.decode() for path, data in hub.files(REPO).items() if path.startswith("last-checkpoint/")}


def titles():
    return [commit.title for commit in HfApi().list_repo_commits(REPO)][:-1]


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- what arrives


def test_every_checkpoint_is_one_commit_and_replaces_all_of_the_one_before(hub, output_dir):
    push = BackgroundPush(output_dir, None, "hf_owner", private=True)
    push.push_checkpoint(*checkpoint(output_dir, 10, ["a.bin", "b/c.bin"]))
    until(lambda: push.report)
    push.push_checkpoint(*checkpoint(output_dir, 20, ["a.bin", "d.bin"]))
    assert push.finish() == {10: "pushed", 20: "pushed"}
    assert files(hub) == {"last-checkpoint/a.bin": "a.bin of step 20", "last-checkpoint/d.bin": "d.bin of step 20"}
    assert titles() == ["Checkpoint of step 20", "Checkpoint of step 10"]
    assert HfApi().model_info(REPO).private
    assert sorted(path.name for path in output_dir.iterdir()) == ["checkpoint-10", "checkpoint-20"]


def test_a_slow_network_gets_the_latest_checkpoint_only_and_nobody_waits(hub, hold, output_dir):
    """Checkpoints may be renamed and deleted meanwhile, as those beyond the limit are."""
    push = BackgroundPush(output_dir)
    for step in (10, 20, 30, 40):
        push.push_checkpoint(*checkpoint(output_dir, step))
        hold.reached.wait(20)
        doomed = (output_dir / f"checkpoint-{step}").rename(output_dir / "doomed.partial")
        shutil.rmtree(doomed)
    # None of these calls waited for the Hub, which has not answered yet.
    assert titles() == []
    hold.released.set()
    assert push.finish() == {10: "pushed", 20: "superseded", 30: "superseded", 40: "pushed"}
    assert files(hub)["last-checkpoint/training_state.json"].endswith("step 40")


# ---- faults


@pytest.mark.parametrize(
    "fault",
    [
        LoseAnswer(**COMMIT),
        AnswerStatus(**COMMIT, status=503, times=8),
        CutUpload(method="PUT", path="/lfs/", after=10, times=8),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_push_that_fails_is_tried_again_until_it_succeeds(hub, output_dir, quick, waits, caplog, fault):
    hub.faults.append(fault)
    push = BackgroundPush(output_dir)
    with caplog.at_level(logging.WARNING):
        push.push_checkpoint(*checkpoint(output_dir, 10))
        assert push.finish() == {10: "pushed"}
    assert "failed, will be tried again" in caplog.text
    assert titles() == ["Checkpoint of step 10"]


@pytest.mark.parametrize("is_last", [False, True])
def test_a_pause_ends_with_a_later_checkpoint_or_the_end_of_training(hub, output_dir, caplog, is_last):
    hub.faults.append(AnswerStatus(**COMMIT, status=429, retry_after=10**6))
    push = BackgroundPush(output_dir)
    push.push_checkpoint(*checkpoint(output_dir, 10))
    until(lambda: "tried again" in caplog.text)
    if not is_last:
        push.push_checkpoint(*checkpoint(output_dir, 20))
    assert push.finish(timeout=20) == ({10: "pushed"} if is_last else {10: "superseded", 20: "pushed"})


def test_a_wrong_token_is_reported_and_later_checkpoints_are_tried_nevertheless(hub, output_dir, caplog):
    push = BackgroundPush(output_dir, REPO, "hf_wrong")
    push.push_checkpoint(*checkpoint(output_dir, 10))
    until(lambda: push.report)
    hub.tokens["hf_wrong"] = "owner"
    push.push_checkpoint(*checkpoint(output_dir, 20))
    report = push.finish()
    assert report[20] == "pushed"
    assert "401" in report[10]
    assert "checkpoint of step 10 was not pushed; it is complete in digits" in caplog.text
    assert "hf_wrong" not in caplog.text + str(report)


def test_a_hub_that_stays_away_costs_a_bounded_time_at_the_end(hub, output_dir, quick, waits):
    hub.faults.append(AnswerStatus(method=".*", path=".", status=503, times=10**6))
    push = BackgroundPush(output_dir)
    push.push_checkpoint(*checkpoint(output_dir, 10))
    assert push.finish(timeout=0.3)[10] != "pushed"


def test_an_upload_that_hangs_is_not_waited_for_beyond_the_time_given(hub, hold, output_dir):
    push = BackgroundPush(output_dir)
    push.push_checkpoint(*checkpoint(output_dir, 10))
    hold.reached.wait(20)
    push.push_checkpoint(*checkpoint(output_dir, 20))
    assert push.finish(timeout=0.05) == {10: "not done within 0.05 s", 20: "not done within 0.05 s"}
    hold.released.set()
    push._thread.join(20)
    assert titles() == ["Checkpoint of step 10"]


@pytest.mark.slow
def test_a_process_ends_though_an_upload_hangs(hub, hold, output_dir, fresh_process):
    code = f"""
        import json
        from diffusers_dtr.training.run.sharing import BackgroundPush
        push = BackgroundPush({str(output_dir)!r})
        push.push_checkpoint({str(checkpoint(output_dir, 10)[0])!r}, 10)
        print(json.dumps(push.finish(timeout=5)))
    """
    assert fresh_process(code) == {"10": "not done within 5 s"}
    assert hold.reached.is_set()
    assert not hold.released.is_set()


def test_a_disk_that_is_full_is_reported(hub, output_dir, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    for name in ("os.link", "shutil.copyfile"):
        monkeypatch.setattr(name, full)
    push = BackgroundPush(output_dir)
    push.push_checkpoint(*checkpoint(output_dir, 10))
    assert "No space left on device" in push.finish()[10]
    assert hub.requests == []
