"""Checks of an actor before it predicts, and refusals of the engine; no Ray is needed."""

import os
import socket
from dataclasses import replace

import pytest
import torch

from hf_segformer import SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.cluster.engine import RayEngine, Work, require_ray
from hf_segformer.cluster.options import ClusterOptions
from hf_segformer.cluster.shards import ShardJob
from hf_segformer.data.sources import FileSource
from hf_segformer.inference.batch import predict_batch
from hf_segformer.inference.writers import Outputs
from hf_segformer.version import __version__
from tests.inference.test_predictor import lively, make_image

NODE = socket.gethostname()


def predictor():
    return SegFormerPredictor(lively(), SegFormerImageProcessor(do_resize=False))


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_image(40, 60).save(tmp_path / "a.png")
    job = ShardJob(predictor(), FileSource(["a.png"], tmp_path / "out"), Outputs("parquet"), {})
    versions = {"hf_segformer": __version__, "torch": torch.__version__.partition("+")[0]}
    return Work(job, ClusterOptions(cpus_per_actor=1), versions, str(tmp_path), str(tmp_path))


def test_an_actor_works_in_the_folder_of_the_driver(work, tmp_path, monkeypatch, num_threads):
    num_threads(2)
    monkeypatch.chdir("/")
    job = work.on_this_node()
    assert os.getcwd() == str(tmp_path)
    assert torch.get_num_threads() == 1
    assert job.predict(job.source.items()).num_written == 1


def test_other_versions_are_refused(work):
    other = replace(work, versions={**work.versions, "hf_segformer": "9.9"})
    with pytest.raises(
        ValueError, match=f"node {NODE} has hf_segformer {__version__}; expected 9.9, as the driver has"
    ):
        other.on_this_node()


def test_a_folder_that_a_node_does_not_see_is_named(work):
    other = replace(work, folder="/mnt/not/there", cwd="/mnt/not")
    with pytest.raises(ValueError, match=f"node {NODE} does not see /mnt/not/there; expected a folder that all nodes"):
        other.on_this_node()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_pytorch_does_not_see_is_no_cpu(work):
    other = replace(work, options=ClusterOptions(gpus_per_actor=0.5))
    with pytest.raises(
        ValueError, match=f"node {NODE} has no GPU that PyTorch sees; expected one, or gpus_per_actor 0"
    ):
        other.on_this_node()


def test_other_outputs_are_refused(work, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_segformer.cluster.engine.find_spec", lambda name: name)
    source = FileSource([str(tmp_path)], tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected a FileSource and Outputs\('parquet'\)"):
        predict_batch(predictor(), source, tmp_path / "out", progress=False, engine=RayEngine())


def test_a_predictor_with_an_engine_of_its_own_is_refused(work, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_segformer.cluster.engine.find_spec", lambda name: name)
    other = predictor()
    other.segmenter.network = torch.nn.Identity()
    source = FileSource([str(tmp_path)], tmp_path / "out")
    with pytest.raises(ValueError, match="the predictor has an engine of its own; expected one by PyTorch"):
        predict_batch(other, source, tmp_path / "out", Outputs("parquet"), progress=False, engine=RayEngine())


def test_without_ray_the_package_is_named(monkeypatch):
    monkeypatch.setattr("hf_segformer.cluster.engine.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a cluster needs Ray Data: pip install 'hf-segformer\[ray\]'"):
        require_ray()
    with pytest.raises(ValueError, match="a cluster needs Ray Data"):
        RayEngine()
