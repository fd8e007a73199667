"use strict";
// Draws every figure of the page with the colours of its theme, and again when the theme changes.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures"), templates = read("templates");
  const dark = window.matchMedia("(prefers-color-scheme: dark)"), narrow = window.matchMedia("(max-width: 640px)");
  const root = document.documentElement, button = document.getElementById("theme");
  let chosen = null; // by the button; else the system's
  const theme = () => chosen || (dark.matches ? "dark" : "light");

  // Named one by one: by default there is also one that sends the figure to a service of Plotly.
  const buttons = [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];

  // On a narrow page labels must leave room for the picture.
  const short = (name) => (name.length > 17 ? name.slice(0, 8) + "…" + name.slice(-8) : name);
  const fitted = (figure) => {
    const made = JSON.parse(JSON.stringify(figure));
    if (!narrow.matches) return made;
    made.layout.margin = { ...made.layout.margin, l: 44, r: 8 };
    for (const [name, axis] of Object.entries(made.layout)) {
      if (name.startsWith("xaxis")) Object.assign(axis, { nticks: axis.type === "date" ? 3 : 5, tickangle: 0 });
      if (name.startsWith("yaxis") && axis.ticktext) axis.ticktext = axis.ticktext.map(short);
      if (name.startsWith("yaxis") && axis.type === "category" && axis.categoryarray) {
        Object.assign(axis, { tickvals: axis.categoryarray, ticktext: axis.categoryarray.map(short) });
      }
    }
    for (const trace of made.data) {
      if (trace.type !== "heatmap") continue;
      const every = Math.ceil((15 * trace.y.length) / (made.layout.height - 90));
      const names = trace.y.filter((_, row) => row % every === 0);
      Object.assign(made.layout.yaxis, { tickvals: names, ticktext: names.map(short) });
      trace.colorbar = { ...trace.colorbar, thickness: 8 };
    }
    return made;
  };

  const draw = async () => {
    const now = theme();
    root.dataset.theme = now;
    button.textContent = now === "dark" ? "Light" : "Dark";
    for (const [key, figure] of Object.entries(figures)) {
      const { data, layout } = fitted(figure);
      const small = narrow.matches || layout.height < 220;
      const settings = { responsive: true, displaylogo: false, modeBarButtons: buttons, displayModeBar: small ? false : "hover" };
      if (data.some((trace) => trace.type === "heatmap")) layout.plot_bgcolor = templates[now].empty;
      await Plotly.react(key, data, { ...layout, template: templates[now] }, settings);
    }
    root.dataset.drawn = now; // everything is drawn
  };
  let before = Promise.resolve();
  const again = () => (before = before.then(draw));
  dark.addEventListener("change", again);
  narrow.addEventListener("change", again);
  button.addEventListener("click", () => { chosen = theme() === "dark" ? "light" : "dark"; again(); });
  again();
})();
