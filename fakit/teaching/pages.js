// Turn each static figure into an interactive one, one at a time, when plotly has loaded; else the picture stays.
addEventListener("load", () => {
  if (!window.Plotly) return;
  const waiting = [...document.querySelectorAll("figure.fakit-figure > script")];
  const next = () => {
    const source = waiting.shift();
    if (!source) { document.body.dataset.figures = "ready"; return; }
    const figure = source.parentElement, still = figure.querySelector(".static"), live = document.createElement("div");
    const spec = JSON.parse(source.textContent);
    figure.append(live);
    Plotly.newPlot(live, spec.data, spec.layout, { ...spec.config, displaylogo: false, responsive: false })
      .then(() => { still.hidden = true; })
      .catch((error) => { live.remove(); console.error(error); })
      .finally(() => setTimeout(next, 0));
  };
  next();
});
