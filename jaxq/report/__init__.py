"""What a run did to each site: records, a terminal table, and self-contained HTML pages."""

from jaxq.report.comparison import comparison_html as comparison_html
from jaxq.report.records import Report as Report
from jaxq.report.records import SiteReport as SiteReport
