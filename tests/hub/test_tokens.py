"""Invalid tokens are refused where they come in, before anything is sent, and never repeated."""

from __future__ import annotations

import pytest
from diffusers import DDPMScheduler
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.hub import check_token, create_run_repo, push_folder, push_run
from diffusers_dtr.model_card import fetch_card
from diffusers_dtr.training.run.sharing import BackgroundPush


REPO = "owner/tiny"
SECRET = "hf_secret"
INVALID = [f"{SECRET}\r\n", f"a\n{SECRET}", f"{SECRET}\x00", f"{SECRET}\x7f", f" {SECRET}", f"{SECRET}é"]


def pipeline():
    return DTRPipeline(DDPMScheduler(), transformer=routed_dit())


ENTRANCES = {
    "model loaded": lambda token, folder: DTRTransformer2DModel.from_pretrained(REPO, token=token),
    "config loaded": lambda token, folder: DTRTransformer2DModel.load_config(REPO, token=token),
    "pipeline loaded": lambda token, folder: DTRPipeline.from_pretrained(REPO, token=token),
    "pipeline downloaded": lambda token, folder: DTRPipeline.download(REPO, token=token),
    "model pushed": lambda token, folder: routed_dit().push_to_hub(REPO, token=token),
    "saved model pushed": lambda token, folder: routed_dit().save_pretrained(
        folder, push_to_hub=True, repo_id=REPO, token=token
    ),
    "saved pipeline pushed": lambda token, folder: pipeline().save_pretrained(
        folder, push_to_hub=True, repo_id=REPO, token=token
    ),
    "folder committed": lambda token, folder: push_folder(folder, REPO, "Upload", token=token),
    "repository made": lambda token, folder: create_run_repo(folder, REPO, token),
    "run pushed": lambda token, folder: push_run(folder, REPO, token, None, "End of training"),
    "checkpoints pushed": lambda token, folder: BackgroundPush(folder, REPO, token),
    "card fetched": lambda token, folder: fetch_card(REPO, token=token),
}


@pytest.mark.parametrize("entrance", ENTRANCES.values(), ids=ENTRANCES)
def test_an_invalid_token_is_refused_before_anything_is_sent_and_not_repeated(hub, tmp_path, caplog, capsys, entrance):
    for token in INVALID:
        with pytest.raises(ValueError, match="`token` must be printable ASCII") as caught:
            entrance(token, tmp_path)
        assert caught.value.__cause__ is None
        assert SECRET not in str(caught.value) + caplog.text + "".join(capsys.readouterr())
    assert hub.requests == []


def test_a_valid_token_is_left_as_it_is():
    assert [check_token(token) for token in ("hf_secret", None, False)] == ["hf_secret", None, False]
    with pytest.raises(ValueError, match="`token`"):
        check_token("")
