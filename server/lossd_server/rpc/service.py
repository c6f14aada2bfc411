"""The methods of `LossService`: decode, ask the engine, encode."""

import time
from functools import partial

from lossd import __version__
from lossd.v1 import loss_service_pb2 as pb
from lossd.writing import Piece, message_field, tags_of
from lossd_server.config import ServerConfig
from lossd_server.engine import Engine, describe_device
from lossd_server.rpc import decode, encode
from lossd_server.rpc.caller import Caller
from lossd_server.rpc.enums import ASSIGNER_PRESETS, LOSS_PRESETS, numbers_of
from lossd_server.rpc.forms import Request
from lossd_server.rpc.losses import LOSS_KINDS
from lossd_server.rpc.metrics import Metrics
from lossd_server.rpc.outputs import places_of
from lossd_server.rpc.recipes import AssignRecipe, LossRecipe
from lossd_server.rpc.stages import Stages
from lossd_server.shared_memory import RegionListener, Regions
from lossd_server.targets import BYTES_OF_POSITIVE

_LOSS_TIMINGS = tags_of(pb.ComputeLossResponse.DESCRIPTOR)["timings"]
_TARGET_RESULTS = tags_of(pb.AssignTargetsResponse.DESCRIPTOR)["results"]
_TARGET_TIMINGS = tags_of(pb.AssignTargetsResponse.DESCRIPTOR)["timings"]


class LossService:
    """Answers requests: messages in, messages in pieces out, `LossdError` for what is refused."""

    def __init__(
        self, engine: Engine, metrics: Metrics, config: ServerConfig, sharing: RegionListener | None = None
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._config = config
        self._sharing = sharing
        self._began = time.monotonic()

    def compute_loss(
        self, request: Request[pb.ComputeLossRequest], stages: Stages, caller: Caller
    ) -> list[Piece]:
        """Evaluates a batch of items."""
        recipe = request.recipe
        if recipe is None:
            job = decode.read_loss_job(request, self._engine.custom_losses, self._regions(caller))
            load = self._engine.load_of(job)
            request.mark_as_checked(partial(LossRecipe.of, message=request.message, job=job, load=load))
            places = [*map(places_of, request.message.items)]
        else:
            job, load = recipe.job(request.payloads, self._regions(caller)), recipe.load
            places = recipe.places
        request.payloads.clear()
        stages.end()
        outcomes, timing = self._engine.compute(job, caller.asker, load)
        del job  # with the memory of the request, before the answer takes as much
        stages.add("queue", timing.queue)
        stages.add("compute", timing.compute)
        stages.begin("encode")
        answer = encode.loss_results(outcomes, places)
        self._metrics.of("ComputeLoss").count_outcomes(outcomes)
        return answer + message_field(_LOSS_TIMINGS, [stages.timings()])

    def assign_targets(
        self, request: Request[pb.AssignTargetsRequest], stages: Stages, caller: Caller
    ) -> list[Piece]:
        """Assigns targets to a batch of items."""
        recipe = request.recipe
        if recipe is None:
            job = decode.read_assign_job(request, self._config.max_message_bytes, self._regions(caller))
            request.mark_as_checked(partial(AssignRecipe.of, job=job))
        else:
            job = recipe.job(request.payloads)
        result = partial(
            encode.target_result,
            target_format=request.message.format,
            preset=job.assigner.preset,
            narrow=request.message.narrow_integers,
        )
        del request  # with its memory, before there is a wait for a core
        stages.end()
        if job.answer_bytes:
            caller.reserve(job.answer_bytes)
        assignments, timing = self._engine.assign(job, caller.asker)
        if not job.answer_bytes:
            caller.reserve(BYTES_OF_POSITIVE * sum(found.positive_count for found in assignments))
        stages.add("queue", timing.queue)
        stages.add("compute", timing.compute)
        stages.begin("encode")
        answer: list[Piece] = []
        for found in assignments:
            answer += message_field(_TARGET_RESULTS, result(found))
        self._metrics.of("AssignTargets").count_assignments(assignments)
        return answer + message_field(_TARGET_TIMINGS, [stages.timings()])

    def get_server_info(
        self, _request: Request[pb.GetServerInfoRequest], stages: Stages, caller: Caller
    ) -> list[Piece]:
        """Says what this server is and offers."""
        stages.end()
        info = pb.GetServerInfoResponse(
            version=__version__,
            devices=[describe_device(self._engine.device)],
            losses=LOSS_KINDS,
            custom_losses=[
                pb.CustomLossInfo(name=loss.name, inputs=loss.inputs)
                for loss in self._engine.custom_losses.values()
            ],
            loss_presets=numbers_of(LOSS_PRESETS),
            assigner_presets=numbers_of(ASSIGNER_PRESETS),
            max_message_bytes=self._config.max_message_bytes,
            max_stream_count=self._config.max_streams,
            uptime_seconds=time.monotonic() - self._began,
        )
        if self._sharing is not None and caller.is_on_this_host:
            info.shared_memory_socket = self._sharing.path
            info.max_shared_bytes = self._config.max_shared_bytes
            info.shared_gpu = self._sharing.regions.gpu_uuid
        return [info.SerializeToString()]

    def _regions(self, caller: Caller) -> Regions | None:
        """Returns the shared memory that a caller may name."""
        return self._sharing.regions if self._sharing is not None and caller.is_on_this_host else None
