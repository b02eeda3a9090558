/** Whether what an element stands on is dark: the page says so, or else the reader's system. */
export function isDark(element: Element): boolean {
  for (let at: Element | null = element.parentElement; at; at = at.parentElement) {
    const parts = getComputedStyle(at).backgroundColor.match(/[\d.]+/g)?.map(Number) ?? [];
    const [red, green, blue, alpha = 1] = parts;
    if (red === undefined || green === undefined || blue === undefined || alpha < 0.5) continue;
    return 0.299 * red + 0.587 * green + 0.114 * blue < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}
