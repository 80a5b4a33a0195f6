"""Find the widths and depths of a network that can be reduced, and reduce them.

channel_consumers.py  find the layers that consume each channel
config_widths.py      find the numbers of the configuration that are widths
narrowing.py          build a network without some channels, and check it
prunable_widths.py    find the widths that can be reduced, with reasons for the others
config_depth.py       find the numbers of the configuration that count layers
"""
