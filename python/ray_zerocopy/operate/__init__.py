"""For those who run a cluster: a command line, a doctor, a demo, a Grafana dashboard.

Imports everything; nothing imports it.
"""
