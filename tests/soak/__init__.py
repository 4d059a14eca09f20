"""Random campaigns: `make soak MINUTES=n` runs them for a time, the test suite their first cases.

A new campaign is a file with a `Campaign`, and one line here. Inputs that are damaged have campaigns in `fuzz`.
"""

from soak import depthwise
from soak.campaign import Campaign

CAMPAIGNS: dict[str, Campaign] = {campaign.name: campaign for campaign in (depthwise.CAMPAIGN,)}
