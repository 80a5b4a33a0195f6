"""Methods for embedding tables: one storage format or composition, and one step, a file.

A format's file reads from top to bottom: plain functions of tensors, the custom op with its
gradient, the format object, the step's settings. A composition's file has a class that looks rows
up in smaller tables in place of the op. A file named after no method holds what several share:

grid, clipping, least_squares   even levels, where their ranges end: what faster loops keep to
kernels, compiled               the same as compiled loops
scales, planar                  scales that rows share; codes of less than a byte
lloyd, codebooks, reassign      k-means, sizes of codebooks, codes chosen anew for a task
row_map, kept_order             which row of a smaller table each id reads
"""
