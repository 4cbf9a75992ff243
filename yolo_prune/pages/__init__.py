# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pages about models: these run the models that `report` only draws."""
