import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from app.manifest import EngineSpec, Manifest
from export.config import MAX_QUEUE, render_config
from export.spec import Engine, Loaded, Reference
from export.stage import stage
from tests.export.small import CLASSES, make_request


@pytest.fixture
def manifest(tmp_path_factory: pytest.TempPathFactory, made: tuple[Engine, Reference], loaded: Loaded) -> Manifest:
    with stage([made[0]], loaded, make_request(tmp_path_factory.mktemp("config"))) as (staged,):
        return staged.manifest


def parse(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_text_is_what_triton_reads(manifest: Manifest) -> None:
    config = parse(render_config(manifest))
    assert (config.name, config.backend, config.default_model_filename) == ("small", "onnxruntime", "model.onnx")
    assert config.max_batch_size == 8
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("image", model_config_pb2.TYPE_UINT8, [32, 32, 3])]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [
        ("probabilities", model_config_pb2.TYPE_FP32, [CLASSES])
    ]
    assert config.version_policy.latest.num_versions == 2
    assert config.parameters["intra_op_thread_count"].string_value == "1"


def test_the_queue_is_bounded_and_no_batch_is_waited_for(manifest: Manifest) -> None:
    batching = parse(render_config(manifest)).dynamic_batching
    policy = batching.default_queue_policy
    assert not batching.preferred_batch_size
    assert batching.max_queue_delay_microseconds == 0
    assert policy.max_queue_size == MAX_QUEUE
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.default_timeout_microseconds > 0


@pytest.mark.parametrize(("max_batch", "rows"), [(8, [1, 8]), (1, [1])])
def test_the_smallest_and_the_largest_batch_are_warmed_up(manifest: Manifest, max_batch: int, rows: list[int]) -> None:
    engine = manifest.engine.model_copy(update={"max_batch": max_batch})
    config = parse(render_config(manifest.model_copy(update={"engine": engine})))
    assert [warmup.batch_size for warmup in config.model_warmup] == rows
    assert all(list(warmup.inputs["image"].dims) == [32, 32, 3] for warmup in config.model_warmup)


def test_a_plan_runs_on_the_gpu(manifest: Manifest) -> None:
    engine = EngineSpec(kind="tensorrt", file="model.plan", sha256="0" * 64, size=0)
    config = parse(render_config(manifest.model_copy(update={"engine": engine})))
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert not config.parameters
