"""Find the widths and depths of a network that can be reduced, and reduce them.

channel_consumers.py  the layers that read each channel
config_widths.py      numbers of the configuration that are widths
narrowing.py          a network without some channels, and a check of it
prunable_widths.py    widths that can be reduced, and reasons for the others
config_depth.py       numbers of the configuration that count layers
"""
