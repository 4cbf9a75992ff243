# SPDX-License-Identifier: AGPL-3.0-or-later
"""The environment of a run: releases, ranks, files, versions, checkpoints, the log."""
