# SPDX-License-Identifier: AGPL-3.0-or-later
"""What we run in: releases, ranks, files, versions, checkpoints, the log."""
