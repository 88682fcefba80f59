const chart = document.getElementById("chart");
const figure = JSON.parse(document.getElementById("figure").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const colors = () => ({
  "font.color": dark.matches ? "#c3cad2" : "#3c444d",
  "hoverlabel.bgcolor": dark.matches ? "#22272d" : "#ffffff",
  "hoverlabel.bordercolor": dark.matches ? "#4a525b" : "#c8ced5",
});
const options = {
  responsive: true,
  displaylogo: false,
  modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
};
Plotly.newPlot(chart, figure.data, figure.layout, options)
  .then(() => Plotly.relayout(chart, colors()));
dark.addEventListener("change", () => Plotly.relayout(chart, colors()));
const logTicks = figure.layout.yaxis.dtick;
const buttons = document.querySelectorAll("button[data-scale]");
for (const button of buttons) {
  button.addEventListener("click", () => {
    for (const each of buttons) each.setAttribute("aria-pressed", each === button);
    const type = button.dataset.scale;
    const dtick = type === "log" ? logTicks : null;
    Plotly.relayout(chart, {"yaxis.type": type, "yaxis.dtick": dtick, "yaxis.autorange": true});
  });
}
