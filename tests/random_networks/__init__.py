"""Random networks: made of the parts of recommenders, compressed in every format, and compared.

Read in this order:

parts.py           parts that work on vectors, and what a part is
shape_parts.py     parts that move or squash the numbers of a vector
field_parts.py     parts that work on stacked fields: interactions
sequence_parts.py  parts that work on sequences: masked pooling and attention
input_parts.py     parts that read inputs: lookups, bags, histories, raw numbers
network.py         a network built from a list of parts
generator.py       from a seed to a network with its signature and weights
inputs.py          rows at every edge, and the request policy a second time
reference.py       the same network over decoded weights
check.py           what is compared, and what counts as a fault
steps.py           the steps with drawn settings
passes.py          which steps and targets one network goes through
shrink.py          a smaller network that still fails
__main__.py        the command line
"""
