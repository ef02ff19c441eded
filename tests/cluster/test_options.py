"""Options of prediction on a cluster: what does not go together is one line, before Ray or the model is loaded."""

import pytest

from hf_segformer.cluster.options import ClusterOptions, check_address, is_address, shown_address
from tests.support.commands import assert_usage_error

PREDICT = ("predict", "model", "images", "--output-dir", "out", "--engine", "ray")
STORED = ("predict", "model", "--output-dir", "out", "--engine", "ray")


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("hf_segformer.cli.cluster.find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actors": (0, 1)}, "actors is 0:1"),
        ({"actors": (3, 2)}, "actors is 3:2"),
        ({"gpus_per_actor": -0.5}, "gpus_per_actor is -0.5; expected a part of one GPU"),
        ({"gpus_per_actor": 1.5}, "gpus_per_actor is 1.5; expected a part of one GPU, or a whole number"),
        ({"gpus_per_actor": float("nan")}, "gpus_per_actor is nan"),
        ({"cpus_per_actor": 0}, "cpus_per_actor is 0; expected at least 1"),
        ({"retries": -1}, "retries is -1; expected at least 0"),
        ({"address": "ray://host:10001"}, "address is 'ray://host:10001'; expected HOST:PORT"),
        ({"address": "host:65536"}, "address is 'host:65536'; expected HOST:PORT"),
        ({"address": ""}, "address is ''; expected HOST:PORT"),
        ({"address": "host"}, "address is 'host'; expected HOST:PORT"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ClusterOptions(**options)


def test_options_of_all_kinds():
    assert ClusterOptions(actors=(2, 2), gpus_per_actor=2.0, address="head.cluster:6379").retries == 3
    assert ClusterOptions(address="auto").actors == (1, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--format", "png"), "--format png is given with --engine ray, which writes Parquet; leave it out"),
        (("--overlay",), "--overlay is given with --engine ray, which has no use for it; leave it out"),
        (("--probabilities", "uint8"), "--probabilities is given with --engine ray"),
        (("--keep-identity",), "--keep-identity is given with --engine ray"),
        (("--device", "cuda"), "--device is given with --engine ray, which chooses by --gpus-per-actor"),
        (("--tile-size", 256), "--tile-size is given with --engine ray"),
        (("--tile-overlap", 16), "--tile-overlap is given with --engine ray"),
        (("--confidence",), "--confidence is given with --engine ray"),
        (("--polygons", "gpkg"), "--polygons is given with --engine ray"),
        (("--mosaic",), "--mosaic is given with --engine ray"),
        (("--frame-masks", "video"), "--frame-masks is given with --engine ray"),
        (("--smoothing", 0.5), "--smoothing is given with --engine ray"),
        (("--axis", 2), "--axis is given with --engine ray, which predicts no volumes; expected --pages, too"),
        (("--actors", "0:3"), "--actors is 0:3; expected at least 1"),
        (("--actors", "3:x"), "got '3:x'; expected MIN:MAX, such as 1:8, or one number"),
        (("--gpus-per-actor", 2.5), "--gpus-per-actor is 2.5; expected a part of one GPU"),
        (("--ray-address", "here"), "--ray-address is 'here'; expected HOST:PORT"),
    ],
)
def test_options_without_effect_are_refused_by_name(arguments, words, capsys, installed):
    assert_usage_error([*PREDICT, *arguments], capsys, words)


def test_data_sets_and_streams_are_refused_by_name(capsys, installed):
    assert_usage_error([*STORED, "--dataset", "name"], capsys, "--dataset is given with --engine ray")
    assert_usage_error([*STORED, "--stream", "rtsp://x", "--seconds", 3], capsys, "--stream is given with --engine ray")


@pytest.mark.parametrize(
    "option", [("--actors", 2), ("--gpus-per-actor", 1), ("--retries", 0), ("--ray-address", "auto")]
)
def test_options_of_the_cluster_need_the_engine(option, capsys):
    arguments = ["predict", "model", "images", "--output-dir", "out", *option]
    assert_usage_error(arguments, capsys, f"{option[0]} is given without --engine ray, to which it applies")


def test_without_ray_the_package_is_named(capsys, monkeypatch):
    monkeypatch.setattr("hf_segformer.cli.cluster.find_spec", lambda name: None)
    assert_usage_error(PREDICT, capsys, "--engine ray needs Ray Data: pip install 'hf-segformer[ray]'")


def test_torchrun_is_refused(capsys, monkeypatch, installed):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_usage_error(PREDICT, capsys, "--engine ray starts its own processes")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["http://host/a"], "http://host/a is no address of object storage; expected one of s3://, gs://, file://"),
        (["s3://KEY:SECRET@b/a", "images"], "s3://b/a is given with images; expected addresses alone"),
        (["s3://KEY:SECRET@b/*.png"], "s3://b/*.png is a pattern; expected an object, or a folder of objects"),
        (["s3://KEY:SECRET@b/a", "--pages"], "--pages is given with s3://b/a"),
    ],
)
def test_wrong_addresses_are_refused_without_their_keys(inputs, words, capsys, installed):
    assert_usage_error([*STORED, *inputs], capsys, words)


@pytest.mark.parametrize("engine", ["ray", "torch"])
def test_results_go_to_no_address(engine, capsys, installed):
    arguments = ["predict", "model", "images", "--output-dir", "s3://KEY:SECRET@bucket/out", "--engine", engine]
    assert_usage_error(arguments, capsys, "s3://bucket/out is an address; expected a folder of this machine")


def test_one_process_reads_no_addresses(capsys):
    arguments = ["predict", "model", "s3://KEY:SECRET@bucket/a?region=x", "--output-dir", "out"]
    assert_usage_error(arguments, capsys, "s3://bucket/a is an address; expected files, folders or patterns")


def test_addresses_are_told_from_paths():
    assert [is_address(text) for text in ("s3://b", "file:///a", "a/b", "C:/b", "@list", "a:b")] == [
        True,
        True,
        *4 * [False],
    ]
    check_address("gs://bucket/a%20b")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://c/d@e?f=g", "s3://c/d@e"),
        ("s3://a:SECRET@c/d?f=g", "s3://c/d"),
        ("s3://SECRET@c/d", "s3://c/d"),
        ("s3://AKIAKEY:abc/SECRET@bucket/x", "s3://bucket/x"),
        ("s3://AKIAKEY:abc/SEC+RET/@bucket/x?region=y", "s3://bucket/x"),
        ("s3://AKIAKEY:SEC@RET@bucket/x", "s3://bucket/x"),
        ("s3://AKIAKEY:abc?SECRET@bucket/x", "s3://..."),
        ("s3://bucket/x?endpoint_override=http://me:SECRET@host&secret_key=SECRET", "s3://..."),
    ],
)
def test_an_address_is_shown_without_its_keys(address, shown):
    assert shown_address(address) == shown
