# SPDX-License-Identifier: AGPL-3.0-or-later
"""torch-pruning's graph, groups and pruners, on the models that this package can read."""
