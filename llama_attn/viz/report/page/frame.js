// What every page has: the theme, and what is said where it cannot be drawn.

let report = null;

// `repaint` draws again what has colours of the theme and is no chart.
function buildTheme(repaint) {
  const button = $("theme");
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`); };
  const again = () => { label(); redraw(null); repaint(); };
  button.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; again(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  label();
}

async function begin(main) {
  try {
    report = JSON.parse(await textOf("about"));
    await main();
  } catch (error) {
    const trouble = $("trouble");
    trouble.hidden = false;
    trouble.textContent = typeof DecompressionStream === "undefined"
      ? "This browser cannot open compressed data. Any browser of 2024 or later can." : `This page could not be drawn: ${error.message}`;
    throw error;
  }
}
