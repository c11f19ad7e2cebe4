"""Scripts and manifests that start a run on a cluster, filled from the templates beside this file."""
