// Light or dark: the system's, until the reader chooses. Runs before the first paint.
"use strict";

const theme = {
  remembered() {
    try { return localStorage.getItem("theme"); } catch { return null; } // not allowed from disk everywhere
  },
  turn() {
    const now = document.documentElement.dataset.theme
      || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    const chosen = now === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = chosen;
    try { localStorage.setItem("theme", chosen); } catch { /* then it holds for this page */ }
  },
};
if (["light", "dark"].includes(theme.remembered())) document.documentElement.dataset.theme = theme.remembered();
