"""Faults in bit packing, compiled kernels and maps of rows.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
A row of codes is cut into equal parts, the planes; byte ``j`` of the packed row has code ``j`` of
every plane. Rows are packed by numba kernels, and by the torch functions that specify their results
(``clipping.py``, ``levels.py``). A row map has, for each id, the number of the stored row that it
reads.
"""

from tests.seeded_faults.fault import Fault

PACKING = (
    "tests/compressors/quantize/test_rowwise.py"
    "::test_packed_codes_equal_the_numpy_reference_and_unpack_to_the_codes"
)
WEIGHT_ONLY = "tests/compressors/quantize/test_weight_only.py"
KERNELS = "tests/compressors/quantize/test_kernels.py"

FAULTS = (
    Fault(
        id="planar-second-and-fourth-plane-exchanged",
        file="compressors/quantize/kernels/bitpacking.py",
        old="        packed |= padded[:, plane * width : (plane + 1) * width] << (bits * plane)",
        new="        packed |= padded[:, plane * width : (plane + 1) * width] "
        "<< (bits * (planes - plane))",
        effect="The second and fourth plane of 2-bit codes are exchanged.",
        tests=(PACKING,),
    ),
    Fault(
        id="planar-order-of-planes-reversed",
        file="compressors/quantize/kernels/bitpacking.py",
        old="    packed = padded[:, :width].clone()\n    for plane in range(1, planes):\n"
        "        packed |= padded[:, plane * width : (plane + 1) * width] << (bits * plane)\n"
        "    return packed",
        new="    packed = torch.zeros_like(padded[:, :width])\n    for plane in range(planes):\n"
        "        packed |= padded[:, plane * width : (plane + 1) * width] "
        "<< (bits * (planes - 1 - plane))\n    return packed",
        effect="The first weights of a row are in the highest bits: graphs read other weights.",
        tests=(PACKING,),
    ),
    Fault(
        id="planar-padding-is-zero",
        file="compressors/quantize/kernels/bitpacking.py",
        old="2 ** (bits - 1), dtype=torch.uint8)",
        new="0, dtype=torch.uint8)",
        effect="torch and the kernels pad differently, so equal tables have different bytes.",
        tests=(PACKING,),
    ),
    Fault(
        id="kernel-int4-zero-shifted",
        file="compressors/quantize/kernels/numba_kernels.py",
        old="    count, dim = rows.shape\n    is_float16 = scale_16.size > 0\n"
        "    bottom = -top if symmetric else ZERO\n"
        "    shift = np.uint64(8) if symmetric else np.uint64(0)\n"
        "    row_codes = np.zeros((1, dim + 1), np.uint8)\n    smallest",
        new="    count, dim = rows.shape\n    is_float16 = scale_16.size > 0\n"
        "    bottom = -top if symmetric else ZERO\n"
        "    shift = np.uint64(7) if symmetric else np.uint64(0)\n"
        "    row_codes = np.zeros((1, dim + 1), np.uint8)\n    smallest",
        effect="The int4 codes of kernels are one level too low.",
        tests=(
            "tests/compressors/quantize/test_rowwise.py"
            "::test_stored_codes_scales_and_offsets_equal_the_numpy_reference",
        ),
    ),
    Fault(
        id="kernel-ties-go-up",
        file="compressors/quantize/kernels/numba_kernels.py",
        old="        codes[target_row, index] = np.uint8(_bits(multiple + ROUNDER))\n",
        new="        codes[target_row, index] = np.uint8(_bits(np.floor(multiple + HALF) + ROUNDER))\n",
        effect="Kernels round a weight halfway between two levels up, not to even.",
        tests=(
            "tests/compressors/quantize/test_rowwise.py"
            "::test_weights_halfway_between_two_levels_are_rounded_as_documented",
        ),
    ),
    Fault(
        id="kernel-odd-width-padding",
        file="compressors/quantize/kernels/numba_kernels.py",
        old="& np.uint8(15)) | np.uint8(0x80)",
        new="& np.uint8(15))",
        effect="The padding of an odd int4 row differs from that of torch.",
        tests=(f"{KERNELS}::test_encoding_normal_rows_equals_the_specification_bit_for_bit",),
    ),
    Fault(
        id="kernel-float16-truncates",
        file="compressors/quantize/kernels/numba_kernels.py",
        old="np.int32(0xFFF) + ((size >> np.int32(13)) & np.int32(1))",
        new="np.int32(0)",
        effect="Scales of kernels are truncated to float16 instead of rounded to even.",
        tests=(f"{KERNELS}::test_encoding_normal_rows_equals_the_specification_bit_for_bit",),
    ),
    Fault(
        id="kernel-threads-share-first-scales",
        file="compressors/quantize/kernels/row_encoding.py",
        old="scale_slice = slice(begin // group_rows, -(-end // group_rows))",
        new="scale_slice = slice(0, -(-end // group_rows))",
        effect="With several threads rows are rounded by the scales of the first rows.",
        tests=(f"{KERNELS}::test_results_and_errors_do_not_depend_on_the_number_of_threads",),
    ),
    Fault(
        id="weight-only-nibbles-swapped",
        file="compressors/quantize/dense/weight_only.py",
        old="codes[:, 0::2] | (codes[:, 1::2] << 4)",
        new="codes[:, 1::2] | (codes[:, 0::2] << 4)",
        effect="Adjacent 4-bit weights are swapped, so ONNX Runtime multiplies the wrong weights.",
        tests=(
            f"{WEIGHT_ONLY}::test_op_equals_onnxruntimes_kernel",
            f"{WEIGHT_ONLY}::test_unpack_restores_packed_codes_and_padding_is_zero",
        ),
    ),
    Fault(
        id="row-map-byte-offset",
        file="compressors/prune/tables/row_map.py",
        old="dim=1) - 128)",
        new="dim=1) - 127)",
        effect="The bytes of a row map select the wrong rows.",
        tests=("tests/compressors/prune/test_row_maps.py",),
    ),
    Fault(
        id="codes-tensor-sign-bit",
        file="compressors/lower/targets/tensorrt/types.py",
        old="    signed = unpacked ^ 8  # in two's complement the sign is bit 3\n",
        new="    signed = unpacked  # in two's complement the sign is bit 3\n",
        effect="TensorRT reads int4 codes with an error of 8 levels.",
        tests=(
            "tests/compressors/quantize/test_bitpacking.py::test_tensorrt_codes_decode_to_the_packed_codes",
        ),
    ),
)
