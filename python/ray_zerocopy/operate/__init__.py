"""Tools for operators of a cluster: a command line, a doctor, a demo, a Grafana dashboard.

Imports everything; no other module imports it.
"""
