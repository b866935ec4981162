"""`flowroll serve` runs the HTTP server."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowroll.cli.options import ApiKey, Compile, Device, Dtype, ExactnessMode, FastParts, Model, Variant
from flowroll.errors import InvalidRequestError
from flowroll.extras import extra_for

if TYPE_CHECKING:
    from flowroll.serving import ServerConfig

_MAX_PORT = 65535


def serve(
    model: Model = Path("shapes-z_image"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 lets the system choose.")] = 30000,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="HOST",
            help="A name, besides localhost, by which requests may call a server on loopback, and from whose pages browsers "
            "may send them, or *; may be given several times.",
        ),
    ] = None,
    variant: Variant = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    compile: Compile = False,
    graphs: Annotated[
        Literal["auto", "off"], typer.Option(help="Replay forwards of small samples as CUDA graphs, where they are exact.")
    ] = "auto",
    max_graph_bytes: Annotated[int, typer.Option(min=0, help="Most bytes of recorded forwards, the oldest of which go.")] = 4
    * 2**30,
    exactness: ExactnessMode = "exact",
    fast_parts: FastParts = None,
    api_key: ApiKey = None,
    wire_format: Annotated[
        Literal["json", "msgpack"], typer.Option(help="Format of an answer where the client accepts any.")
    ] = "json",
    wire_dialect: Annotated[
        Literal["native", "sglang"], typer.Option(help="Names that an answer uses where the request does not choose.")
    ] = "native",
    sp: Annotated[int, typer.Option(min=1, help="Number of ranks that share the rows of the token sequence.")] = 1,
    cfg_parallel: Annotated[
        bool, typer.Option("--cfg-parallel", help="Run the two guidance branches on two groups of ranks.")
    ] = False,
    tp: Annotated[int, typer.Option(min=1, help="Number of ranks that share the columns of the transformer's weights.")] = 1,
    rank_timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds for which ranks wait for each other.")] = 60.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of one sample, width times height.")] = 2048 * 2048,
    max_steps: Annotated[int, typer.Option(min=1, help="Most denoising steps of one request.")] = 1000,
    max_outputs: Annotated[int, typer.Option(min=1, help="Most samples of one request.")] = 64,
    max_answer_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of the tensors in one answer.")] = 16 * 2**30,
    max_images: Annotated[int, typer.Option(min=1, help="Most reference images of one request.")] = 16,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of one reference image, width times height.")] = 4096
    * 4096,
    max_image_bytes: Annotated[
        int, typer.Option(min=1, help="Most bytes of the files of a request's reference images together.")
    ] = 64 * 2**20,
    max_hashed_bytes: Annotated[
        int, typer.Option(min=0, help="Most bytes of a transformer whose checksum every rollout carries.")
    ] = 4 * 2**30,
    weights_roots: Annotated[
        list[Path] | None,
        typer.Option(
            "--weights-root",
            metavar="DIR",
            help="A folder from which clients may have weights read; may be given several times.",
        ),
    ] = None,
    weight_group_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--weight-group-host",
            metavar="HOST",
            help="A host, besides this machine, whose process group clients may have the server join for weights, or *; "
            "may be given several times.",
        ),
    ] = None,
    max_scores: Annotated[
        int, typer.Option(min=1, help="Most recorded steps whose log-probs one request may have recomputed.")
    ] = 4096,
    max_batch_samples: Annotated[int, typer.Option(min=1, help="Most samples in one forward.")] = 16,
    max_running_samples: Annotated[int, typer.Option(min=1, help="Most samples in memory at once.")] = 32,
    max_running_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of the samples in memory together.")] = 32 * 2**20,
    max_adapters: Annotated[int, typer.Option(min=0, help="Most LoRA adapters in memory at once.")] = 16,
    max_adapter_bytes: Annotated[int, typer.Option(min=0, help="Most bytes of all adapters together.")] = 8 * 2**30,
    max_policies: Annotated[int, typer.Option(min=0, help="Most policies in the host's memory beside the default.")] = 4,
    max_connections: Annotated[int, typer.Option(min=1, help="Most TCP connections at once.")] = 1000,
    max_queue: Annotated[int, typer.Option(min=0, help="Most requests that may wait behind those that run.")] = 64,
    max_control_queue: Annotated[
        int, typer.Option(min=1, help="Most checks of the weights at once, and most changes of weights that may wait.")
    ] = 64,
    max_groups: Annotated[int, typer.Option(min=1, help="Most process groups of trainers at once.")] = 16,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request body, without the tensors in it.")] = 4
    * 2**20,
    max_score_body_bytes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most bytes of a body with its tensors, of /rollout/score, /rollout/generate and /generate.",
        ),
    ] = 2**30,
    send_timeout_s: Annotated[
        float,
        typer.Option(
            min=0.1, max=10**6, help="Seconds for which a client may take nothing of its answer before it is dropped."
        ),
    ] = 60.0,
    min_send_bytes_per_s: Annotated[
        int, typer.Option(min=1, help="Bytes of its answer that a client has to take in a second, in the long run.")
    ] = 256 * 1024,
    max_unsent_bytes: Annotated[
        int, typer.Option(min=1, help="Most bytes of all answers that are expected or not sent to their end.")
    ] = 16 * 2**30,
    max_weights_body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a body with tensors of new weights.")] = 8
    * 2**30,
    weights_idle_s: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds of silence after which an incomplete update is dropped, or samples start again."),
    ] = 60.0,
    allow_pickle_weights: Annotated[
        bool,
        typer.Option(
            "--allow-pickle-weights", help="Accept tensors in shared memory and on GPUs, as SGLang's trainers send them."
        ),
    ] = False,
    lora_merge_mode: Annotated[
        Literal["dynamic", "merge"],
        typer.Option(help="Run an adapter that a trainer pushes beside the weights, or merged into a copy of them."),
    ] = "dynamic",
    receive_timeout_s: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds for a request's headers to arrive, and as many for its body plus one per 64 KiB."),
    ] = 20.0,
    grace_s: Annotated[
        float, typer.Option(min=0, help="Seconds that accepted requests have to finish when the server stops.")
    ] = 5.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Level of the log, which goes to standard error.")
    ] = "info",
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Write lines to read, or one JSON object per line.")
    ] = "text",
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for what is found about this machine's kernels; else FLOWROLL_CACHE_DIR, or the user's cache.",
            show_default=False,
        ),
    ] = None,
    viewer: Annotated[
        Path | None,
        typer.Option(
            metavar="STORE", help="Show the rollouts of this store, or folder of files, at /viewer.", show_default=False
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Send spans of requests to this URL by OTLP over HTTP (extra: otel).")
    ] = None,
) -> None:
    """Serve a checkpoint over HTTP until SIGTERM or Ctrl-C."""
    flags = dict(locals())
    check_address(host, port)
    with extra_for("`flowroll serve`", "server"):
        from flowroll.serving import serve as run_server

        run_server(server_config(flags))


def server_config(flags: Mapping[str, Any]) -> ServerConfig:
    """Returns the configuration that the flags of `serve` say, by the names of its parameters."""
    from flowroll.engine import AdapterLimits, BatchLimits, Limits
    from flowroll.serving import ServerConfig
    from flowroll.types import Layout

    def chosen(kind: type[Any]) -> dict[str, Any]:
        return {field.name: flags[field.name] for field in fields(kind) if field.name in flags}

    values = chosen(ServerConfig)
    for name in ("allowed_hosts", "weight_group_hosts", "weights_roots"):
        values[name] = tuple(map(str, flags[name] or ()))
    values["model"] = str(flags["model"])
    parts: str | None = flags["fast_parts"]
    values["fast_parts"] = None if parts is None else tuple(part.strip() for part in parts.split(","))
    for name in ("cache_dir", "viewer"):
        values[name] = None if flags[name] is None else str(flags[name])
    return ServerConfig(
        **values,
        limits=Limits(**chosen(Limits)),
        batching=BatchLimits(**chosen(BatchLimits)),
        adapter_limits=AdapterLimits(**chosen(AdapterLimits)),
        layout=Layout(**chosen(Layout)),
    )


def check_address(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on now, before the libraries and the checkpoint are loaded.

    Raises:
        InvalidRequestError: Another process listens on the address, or the address is not one of this machine.
    """
    # Under torchrun only rank 0 listens. A port out of range is the configuration's to refuse.
    if os.environ.get("RANK", "0") != "0" or not 0 <= port <= _MAX_PORT:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise InvalidRequestError(
            f"{host}:{port} must be free to listen on, got {error}; choose another --host or --port.", field="port"
        ) from error
