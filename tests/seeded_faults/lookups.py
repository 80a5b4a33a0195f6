"""Faults in merged lookups of tables, and in codes that are passed from tables to int8 layers.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
"""

from tests.seeded_faults.fault import Fault

MERGED = "tests/compressors/lower/test_merged_lookups.py"
CODES = "tests/compressors/lower/test_codes_into_layers.py"
ODD = f"{CODES}::test_network_that_combines_rows_in_an_odd_way_keeps_its_scores"
ONE_SCALE = "tests/compressors/quantize/test_one_scale.py"

FAULTS = (
    Fault(
        id="merged-lookup-without-first-rows",
        file="compressors/lower/lookups/merge_lookups.py",
        old="        if any(offsets):\n",
        new="        if False:\n",
        effect="Every input reads the rows of the first table.",
        tests=(f"{MERGED}::test_lookups_are_merged_if_the_network_also_uses_an_id_elsewhere",),
    ),
    Fault(
        id="merged-columns-in-order",
        file="compressors/lower/lookups/join_rows.py",
        old="    if first % width or count % width or not torch.equal("
        "flat, torch.arange(first, first + count)):\n",
        new="    if first % width or count % width:\n",
        effect="Rows that a network concatenates in another order keep the order of the lookups.",
        tests=(f"{CODES}::test_first_layer_reads_codes_and_rounds_nothing[in_another_order]",),
    ),
    Fault(
        id="changed-id-counts-as-column",
        file="compressors/lower/lookups/find_lookups.py",
        old="    return layout_input(node) or _converted(node)\n",
        new="    source = layout_input(node) or _converted(node)\n"
        "    args = node.all_input_nodes\n"
        "    return source or (args[0] if args else None)\n",
        effect="An id that the network computes is looked up as it was in the request.",
        tests=(f"{MERGED}::test_lookup_of_ids_that_the_network_changes_is_not_merged",),
    ),
    Fault(
        id="list-reads-a-second-copy",
        file="compressors/lower/lookups/merge_lookups.py",
        old="        for number, lookup in enumerate(group.others):\n",
        new="        for number, lookup in enumerate(()):\n",
        effect="A table that an id and a list read is stored twice.",
        tests=(f"{CODES}::test_table_of_an_id_and_of_a_list_is_stored_once",),
    ),
    Fault(
        id="codes-of-another-scale",
        file="compressors/lower/lookups/codes_into_layers.py",
        old="            is_exact = bool(((self.scales[node] == scale) | scale.isnan()).all())\n",
        new="            is_exact = True\n",
        effect="A layer reads codes of a table whose scale is not that of its input channel.",
        tests=(f"{CODES}::test_layer_with_other_scales_than_its_tables_rounds_their_rows",),
    ),
    Fault(
        id="codes-zero-point",
        file="compressors/lower/targets/onnxruntime/operators.py",
        old="[128] * int(scale.shape[0]))\n        return op.QuantizeLinear(x,",
        new="[127] * int(scale.shape[0]))\n        return op.QuantizeLinear(x,",
        effect="Numbers next to the codes are rounded with another zero point than codes.",
        tests=(f"{CODES}::test_other_inputs_of_the_layer_are_rounded_with_a_scale_of_their_own",),
    ),
    Fault(
        id="one-scale-for-every-table",
        file="compressors/quantize/tables/rowwise_int8.py",
        old="        if error <= self.one_scale_error:\n",
        new="        if error <= 100 * self.one_scale_error:\n",
        effect="A table with a very large row loses the weights of all others.",
        tests=(f"{ONE_SCALE}::test_only_the_table_with_a_small_error_gets_one_scale",),
    ),
    Fault(
        id="layer-of-two-tables-has-a-scale-of-one",
        file="compressors/quantize/dense/table_inputs.py",
        old="            sources[name] = torch.where(earlier == by_channel, by_channel, torch.nan)\n",
        new="            sources[name] = earlier\n",
        effect="A layer that is called with rows of two tables is scaled for the first.",
        tests=(f"{ONE_SCALE}::test_layer_of_several_tables_has_the_scale_of_those_with_one",),
    ),
    Fault(
        id="in-place-operators-in-merged-program",
        file="compressors/lower/program.py",
        old="            traced = traced.run_decompositions({})\n",
        new="",
        effect="A network that changes joined rows in place also changes the rows it uses later.",
        tests=(f"{ODD}[rows-joins_in_place]", f"{ODD}[codes-joins_in_place]"),
    ),
    Fault(
        id="rows-of-batches-joined",
        file="compressors/lower/lookups/join_rows.py",
        old="    if dim % len(shape_of(join)) == 0:\n",
        new="    if dim % len(shape_of(join)) == -1:\n",
        effect="Rows of several tables in one longer batch are in another order.",
        tests=(f"{ODD}[rows-joins_batches]", f"{ODD}[codes-joins_batches]"),
    ),
    Fault(
        id="layout-that-cannot-be-followed-counts-as-table",
        file="compressors/quantize/dense/table_inputs.py",
        old="                found = torch.full((1, shape_of(weight)[1]), torch.nan)\n",
        new="                continue\n",
        effect="A layer clips rows of one table at the scale of another.",
        tests=(
            f"{CODES}::test_layer_that_also_reads_rows_in_another_layout_has_no_scale_of_a_table",
        ),
    ),
)
