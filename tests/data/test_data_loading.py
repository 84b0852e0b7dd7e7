"""Where data come from, when the Hub does not answer: what was fetched once is enough, and never another commit."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import HfApi

from hf_cosupervise.data.loading import DataChoice, find_data
from hf_cosupervise.hub.client import UNREACHABLE
from hf_cosupervise.processes import Processes

DATA = "someone/offline"


def choose(revision: str | None = None, streaming: bool = False) -> DataChoice:
    return DataChoice(split="train", revision=revision, config_name=None, streaming=streaming)


def test_data_that_were_fetched_before_need_no_connection(hub: HubServer):
    Dataset.from_dict({"id": [1, 2]}).push_to_hub(DATA)
    commit = HfApi().dataset_info(DATA).sha
    alone = Processes(0, 1)
    fetched, source = find_data(DATA, choose(), alone)
    assert source is not None and source["commit"] == commit
    with hub.down():
        again, known = find_data(DATA, choose(), alone)
        assert again["id"] == fetched["id"] and known == source
        with pytest.raises(UNREACHABLE, match="Go online and try again"):
            find_data(DATA, choose(revision="v1"), alone)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_were_never_fetched_need_one(hub: HubServer, streaming):
    Dataset.from_dict({"id": [1, 2]}).push_to_hub("someone/elsewhere")
    with (
        hub.down(),
        pytest.raises(UNREACHABLE, match="`dataset` needs the data set 'someone/elsewhere'. Go online"),
    ):
        find_data("someone/elsewhere", choose(streaming=streaming), Processes(0, 1))
