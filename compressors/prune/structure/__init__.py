"""Which widths and depths of a network can be reduced.

channel_consumers.py  the layers that read each channel
config_widths.py      numbers of the configuration that are widths
narrowing.py          a network without some channels, and the proof of it
prunable_widths.py    widths that can be reduced, and why others cannot
config_depth.py       numbers of the configuration that count layers
"""
