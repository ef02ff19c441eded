"""Self-contained HTML pages of the evaluation report and of a comparison.

Figures are inlined as PNG data URIs; there is no script, no font and no style sheet to load.
"""

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

from .numbers import percent

_BASE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #202124; --faint: #5f6368; --line: #e4e6ea; --paper: #fff; --ground: #f6f7f9; --blue: #2154c4;
  --orange: #d66014; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 4px 0 12px; }
.faint { color: var(--faint); font-size: 14px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 18px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 12px; margin: 20px 0; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 12px; }
.card .name { color: var(--faint); font-size: 13px; }
img.narrow { max-width: min(100%, 560px); }
.card .value { font-size: 26px; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.3; }
.card .value small { font-size: 14px; font-weight: 400; color: var(--faint); }
.card .span { color: var(--faint); font-size: 13px; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 18px; }
.two section { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
th:first-child, td:first-child, .text { text-align: left; }
tr.mean td { font-weight: 650; border-top: 2px solid var(--ink); border-bottom: 0; }
td small { color: var(--faint); }
td.better { color: var(--blue); font-weight: 650; }
td.worse { color: var(--orange); font-weight: 650; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px;
  vertical-align: -1px; border: 1px solid rgba(0, 0, 0, .2); }
img { max-width: 100%; height: auto; display: block; margin: 8px auto 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0 0; font-size: 14px; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
</style>
</head>
<body><main>
{% macro figure(png, text, kind="") %}
{% if png %}<img class="{{ kind }}" src="{{ png | data_uri }}" alt="{{ text }}">{% endif %}
{% endmacro %}
{% macro small(ends) %}{% if ends %} <small>{{ span(ends) }}</small>{% endif %}{% endmacro %}
{% macro span(ends) %}{% if ends %}[{{ ends[0] | percent }}, {{ ends[1] | percent }}]{% endif %}{% endmacro %}
"""

_REPORT = (
    _BASE
    + """
<h1>{{ title }}</h1>
<p class="faint">Semantic segmentation, evaluated on {{ num_images }} images; scores in percent
{%- if summary.intervals %}, with {{ (100 * summary.intervals.level) | round | int }} % confidence intervals by
bootstrap over {{ summary.intervals.num_drawn }} {{ summary.intervals.unit }}{% endif %}.</p>
<div class="cards">
{% for name, key in cards if summary[key] is not none %}
<div class="card"><div class="name">{{ name }}</div><div class="value">{{ summary[key] | percent }}</div>
<div class="span">{{ span(summary.intervals.get(key)) }}&nbsp;</div></div>
{% endfor %}
</div>
{% if no_plots %}<p class="faint">Figures are missing: they need matplotlib, pip install "hf-segformer[plots]".</p>
{% endif %}
<section><h2>Scores by class</h2>
{% if rows | length < num_classes %}<p class="faint">The worst and the best {{ rows | length }} of {{ num_classes }}
classes by IoU; table.csv has all.</p>{% endif %}
<div class="scroll"><table>
<tr><th>Class</th>{% for key in columns %}<th>{{ headings[key] }}</th>{% endfor %}<th>Pixels</th></tr>
{% for row, color in rows %}
<tr><td><span class="swatch" style="background: rgb({{ color | join(', ') }})"></span>{{ row.name }}</td>
{%- for key in columns %}<td>{{ row[key] | percent }}
{%- if key == "iou" %}{{ small(row.intervals.get("iou")) }}{% endif %}</td>{% endfor -%}
<td>{{ (row.pixels / total) | percent }}</td></tr>
{% endfor %}
<tr class="mean"><td>mean</td>{% for key in columns %}<td>{{ means[key] | percent }}
{%- if key == "iou" %}{{ small(summary.intervals.get("mean_iou")) }}{% endif -%}
</td>{% endfor %}<td></td></tr>
</table></div>
<p class="faint">A dash is a score that is not defined: the class is neither in the masks nor predicted. Boundary IoU
compares pixels within {{ (100 * summary.boundary.dilation_ratio) | round(2) }} % of the image's diagonal of an outline;
boundary F1 allows {{ summary.boundary.tolerance }} pixels. ECE is the expected calibration error, by class over the
pixels that the model gives to the class; its mean is over all pixels. Pixels are shares of the labelled ones.</p>
</section>
{% if iou %}<section><h2>IoU by class</h2>
{{ figure(iou, "IoU by class with confidence intervals") }}</section>{% endif %}
{% if confusion %}
<div class="{{ "two" if num_classes <= 12 else "" }}">
<section><h2>Confusion matrix</h2>
<p class="faint">Rows are true classes and add up to 100 %.</p>
{{ figure(confusion, "Confusion matrix in percent of the true class", "narrow" if num_classes <= 12 else "") }}
</section>
{% if confusions and num_classes > 12 %}<section><h2>Most frequent confusions</h2><div class="scroll"><table>
<tr><th>True class</th><th class="text">Predicted as</th><th>Share of the true class</th><th>Pixels</th></tr>
{% for row in confusions %}<tr><td>{{ row.true }}</td><td class="text">{{ row.predicted }}</td>
<td>{{ row.share | percent }}</td><td>{{ "{:,}".format(row.pixels) }}</td></tr>
{% endfor %}</table></div></section>{% endif %}
{% if reliability %}<section><h2>Calibration</h2>
<p class="faint">Where bars end below the diagonal, the model is surer than it should be.</p>
{{ figure(reliability, "Reliability diagram", "narrow") }}</section>{% endif %}
</div>
{% endif %}
{% if thresholds %}<section><h2>Threshold</h2>
<p class="faint">Scores of {{ summary.classes[1].name }} where its probability is above the threshold.</p>
{{ figure(thresholds, "Dice, precision and recall over the threshold", "narrow") }}
<dl><dt>AUC</dt><dd>{{ summary.binary.auc | percent(2) }}</dd>
<dt>Average precision</dt><dd>{{ summary.binary.average_precision | percent(2) }}</dd>
<dt>Dice at 0.5</dt><dd>{{ summary.binary.at_half.dice | percent }}</dd>
{% if summary.binary.get("threshold") %}<dt>The model's threshold</dt>
<dd>{{ "{:.5g}".format(summary.binary.threshold) }}</dd>
{% endif %}
{% if summary.binary.best %}<dt>Best Dice</dt><dd>{{ summary.binary.best.dice | percent }} at
{{ "{:.5g}".format(summary.binary.best.threshold) }}, found on these images</dd>{% endif %}</dl></section>{% endif %}
{% if worst %}<section><h2>Worst images</h2>
<p class="faint">Lowest mean IoU over the classes that occur in the image. Wrong pixels are red.</p>
{{ figure(worst, "Worst images with labels, predictions and errors") }}</section>{% endif %}
{% if typical %}<section><h2>Typical images</h2>
<p class="faint">Nearest to the median image.</p>
{{ figure(typical, "Typical images with labels, predictions and errors") }}</section>{% endif %}
{% if details %}<section><h2>Method</h2><dl>
{% for name, value in details.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl></section>{% endif %}
</main></body></html>
"""
)

_COMPARISON = (
    _BASE
    + """
<h1>{{ title }}</h1>
<p class="faint">Compared on the same {{ num_images }} images; differences are to {{ baseline }}, with
{{ (100 * level) | round | int }} % intervals and two-sided p-values by paired bootstrap over {{ unit }}
({{ num_resamples }} resamples). P-values of classes are corrected by Holm for {{ num_tests }} tests.</p>
<section><h2>Overall</h2><div class="scroll"><table>
<tr><th>Model</th>{% for heading in overall_headings %}<th>{{ heading }}</th>{% endfor %}
<th>Difference in mean IoU</th><th>p</th></tr>
{% for row in overall %}
<tr><td>{{ row.name }}</td>{% for cell in row.cells %}<td>{{ cell.value | percent }}
{{- small(cell.span) }}</td>{% endfor %}
{% if row.test %}<td class="{{ row.test.verdict }}">{{ row.test.text }}</td><td>{{ row.test.p }}</td>
{% else %}<td></td><td></td>{% endif %}</tr>
{% endfor %}
</table></div></section>
<section><h2>IoU by class</h2><div class="scroll"><table>
<tr><th>Class</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}
{% for name in names[1:] %}<th>{{ name }} &minus; {{ baseline }}</th><th>p</th>{% endfor %}</tr>
{% for row in classes %}
<tr><td>{{ row.name }}</td>{% for value in row.scores %}<td>{{ value | percent }}</td>{% endfor %}
{% for test in row.tests %}<td class="{{ test.verdict }}">{{ test.text }}</td><td>{{ test.p }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="faint">Coloured differences are significant at {{ (1 - level) | round(3) }} after correction.</p></section>
{% for name, png in differences %}<section><h2>{{ name }} minus {{ baseline }}</h2>
{{ figure(png, "Differences in IoU by class") }}</section>{% endfor %}
<section><h2>Images that differ most</h2><div class="scroll"><table>
<tr><th>Image</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}<th>Range of mean IoU</th></tr>
{% for row in images %}<tr><td>{{ row.name }}</td>
{% for value in row.scores %}<td>{{ value | percent }}</td>{% endfor %}
<td>{{ row.range | percent }}</td></tr>{% endfor %}
</table></div>
{{ figure(sheet, "Images that differ most, with the models' predictions") }}</section>
</main></body></html>
"""
)


def render_report(**values: Any) -> str:
    """Render the evaluation report; `report.Report` knows what it needs."""
    return _render(_REPORT, values)


def render_comparison(**values: Any) -> str:
    """Render the page of a comparison; `comparison_report.comparison_html` knows what it needs."""
    return _render(_COMPARISON, values)


def _render(template: str, values: Mapping[str, Any]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "data_uri": _data_uri}
    return environment.from_string(template).render(**values)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


__all__ = ["render_comparison", "render_report"]
