"""ONNX Runtime on CPU: scoring sessions, optimized graphs, and a graph's intermediate values."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compressors.contracts import is_out_of_memory
from infra.errors import BuildRefused, ScoringFailed
from infra.store.temporary import scratch_folder

if TYPE_CHECKING:
    import onnx

FloatArray = NDArray[np.float32]

PROVIDERS = ["CPUExecutionProvider"]
# ONNX Runtime's names of the types that numpy has, with their names there.
NUMPY_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"} | {
    f"tensor({name})": name
    for name in (
        *("float16", "bool"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
}


class Session:
    """Session of one served graph. It takes arrays by input name and returns the outputs."""

    def __init__(self, path: Path, threads: int) -> None:
        """Load the graph at ``path`` with full graph optimization.

        Args:
            path: the ONNX file.
            threads: number of threads within one operator.

        Raises:
            BuildRefused: ONNX Runtime does not accept the graph.
        """
        self._session = _open_session(path, threads, optimized=None)
        self.inputs = tuple(item.name for item in self._session.get_inputs())

    def scores(self, inputs: Mapping[str, NDArray[Any]]) -> FloatArray:
        """Compute the outputs: scores, float32 ``(rows,)``, or vectors, ``(rows, dim)``.

        Several outputs are the columns of one array, ``(rows, outputs)``, in the graph's order.

        Rows with ids outside their table are NaN if the graph was exported to refuse such ids.

        Raises:
            ScoringFailed: the runtime failed on these inputs.
        """
        return _stack(self._run({name: inputs[name] for name in self.inputs}))

    def outputs(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Compute the outputs of any graph from its inputs, both in the graph's order.

        The inputs are converted to the types of the graph.

        Raises:
            ScoringFailed: the runtime failed on these inputs.
        """
        return self._run(
            {
                item.name: array.astype(NUMPY_TYPES[item.type])
                for item, array in zip(self._session.get_inputs(), inputs, strict=True)
            }
        )

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Compute the outputs.

        Raises:
            ScoringFailed: the runtime failed on these inputs.
        """
        try:
            outputs: list[NDArray[Any]] = self._session.run(None, dict(inputs))
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            raise ScoringFailed("scoring_failed", problem=str(fault)) from fault
        return outputs

    def bind(
        self, inputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], FloatArray | tuple[FloatArray, ...]]:
        """Return a function that scores the same inputs at each call, for latency measurements.

        The inputs are bound once (IO binding), as in a server that already has them in the
        runtime's format. ``scores`` passes them from Python, which takes one to two microseconds
        per input. For one row of a model with many inputs, that is as long as all layers take.

        Raises:
            ScoringFailed: the runtime does not accept these inputs, or failed on them.
        """
        import onnxruntime

        try:
            binding = self._session.io_binding()
            for name in self.inputs:
                value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(inputs[name]))
                binding.bind_ortvalue_input(name, value)
            for output in self._session.get_outputs():
                binding.bind_output(output.name)
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            raise ScoringFailed("inputs_refused", problem=str(fault)) from fault

        def call() -> FloatArray | tuple[FloatArray, ...]:
            try:
                self._session.run_with_iobinding(binding)
                outputs = tuple(value.numpy() for value in binding.get_outputs())
            except Exception as fault:
                if is_out_of_memory(fault):
                    raise
                raise ScoringFailed("scoring_failed", problem=str(fault)) from fault
            return outputs[0] if len(outputs) == 1 else outputs

        return call


def _stack(outputs: list[FloatArray]) -> FloatArray:
    """Return the only output, or several as columns."""
    return outputs[0] if len(outputs) == 1 else np.stack(outputs, axis=1)


class OnnxRuntime:
    """ONNX Runtime as the runtime of a target; see ``compressors/contracts/targets/runtime.py``."""

    def version(self) -> str:
        """Return the version of ONNX Runtime."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def open(self, path: Path, threads: int) -> Session:
        """Load a graph with full graph optimization.

        Raises:
            BuildRefused: ONNX Runtime does not accept the graph.
        """
        return Session(path, threads)

    def optimized_graph(self, path: Path) -> "onnx.GraphProto":
        """Return the graph as ONNX Runtime optimized it.

        Raises:
            BuildRefused: ONNX Runtime does not accept the graph.
        """
        return optimized_graph(path)


def optimized_graph(path: Path, threads: int = 1) -> "onnx.GraphProto":
    """Return the graph as the runtime optimized it; weights of 1 MiB or more are not loaded.

    Raises:
        BuildRefused: ONNX Runtime does not accept the graph.
    """
    import onnx

    with scratch_folder("graph") as folder:
        out = Path(folder) / "optimized.onnx"
        _open_session(path, threads, optimized=out)
        graph: onnx.GraphProto = onnx.load(out, load_external_data=False).graph
        return graph


def graph_values(
    path: Path, inputs: Mapping[str, NDArray[Any]], threads: int = 1
) -> list[tuple[str, str, NDArray[Any]]]:
    """Return every value that a graph computes, in graph order: name, operator type and array.

    Values of types that numpy lacks (bfloat16, 8-bit floats, int4) are omitted. Every value becomes
    an output of the graph, so the runtime fuses fewer operators than in a normal session.

    Args:
        path: the graph; a second file is written next to it and removed.
        inputs: arrays by name.
        threads: number of threads of the session.

    Raises:
        BuildRefused: ONNX Runtime does not accept the graph.
        ScoringFailed: the runtime failed on these inputs.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    operators = {name: node.op_type for node in model.graph.node for name in node.output if name}
    outputs = {item.name for item in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in operators if name not in outputs
    )
    temporary = path.with_name(f"values-{path.name}")
    try:
        onnx.save(model, temporary)
        session = _open_session(temporary, threads, optimized=None)
    finally:
        temporary.unlink(missing_ok=True)
    selected = [item.name for item in session.get_outputs() if item.type in NUMPY_TYPES]
    names = [item.name for item in session.get_inputs()]
    try:
        values = session.run(selected, {name: inputs[name] for name in names})
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        raise ScoringFailed("scoring_failed", problem=str(fault)) from fault
    by_name = dict(zip(selected, values, strict=True))
    return [(name, kind, by_name[name]) for name, kind in operators.items() if name in by_name]


def _open_session(path: Path, threads: int, optimized: Path | None) -> Any:
    """Open a session on CPU; if ``optimized`` is a path, write the optimized graph there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        # Weights of 1 MiB (1,048,576 bytes) or more are stored next to the optimized graph, because
        # a protobuf file has at most 2 GiB.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights.bin"
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1048576"
        )
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        raise BuildRefused(
            "onnxruntime_graph_refused", file=path.name, problem=str(fault)
        ) from fault
