# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pages about models. These modules run the models; `report` only draws the results."""
