"""Fixtures that several test files use."""
import pytest
import torch

from helpers import start, tiny_dataset

torch.set_num_threads(1)  # tiny models are fastest on one


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder, see tiny_dataset."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset(folder)
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The out_dir of a short training on data."""
    out = tmp_path_factory.mktemp("out") / "run"
    start(data, out)
    return out
