// What a screen reader or a weak eye would stumble over in the open page, as sentences.
() => {
  const shown = (element) => element.checkVisibility({ visibilityProperty: true });
  const label = (element) => (element.getAttribute("aria-label") || (element.getAttribute("aria-labelledby") || "").split(" ")
    .map((id) => document.getElementById(id)?.textContent ?? "").join(" ") || [...(element.labels ?? [])].map((one) => one.textContent).join(" ") || element.textContent).trim();
  const faults = [];
  const name = (element) => `${element.tagName.toLowerCase()}#${element.id}.${element.className?.baseVal ?? element.className}`;
  for (const element of document.querySelectorAll("a, button, input, textarea, select, progress, summary, dialog, section, article, [role], [tabindex='0']"))
    if (shown(element) && !label(element)) faults.push(`${name(element)} has no label`);
  for (const svg of document.querySelectorAll("svg")) if (!svg.closest("[aria-hidden]") && !svg.getAttribute("aria-label")) faults.push(`${name(svg)} has no label`);
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of new Set(ids)) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push(`id ${id} is there twice`);
  for (const attribute of ["aria-labelledby", "aria-describedby", "aria-activedescendant", "for"])
    for (const element of document.querySelectorAll(`[${attribute}]`))
      for (const id of element.getAttribute(attribute).split(" ")) if (id && !document.getElementById(id)) faults.push(`${name(element)}: ${attribute} ${id} leads nowhere`);
  for (const landmark of ["main", "header.bar", "footer"]) if (document.querySelectorAll(landmark).length !== 1) faults.push(`not one ${landmark}`);
  if (document.querySelectorAll("h1").length !== 1) faults.push("not one h1");
  let level = 1;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    if (!shown(heading)) continue;
    const now = Number(heading.tagName[1]);
    if (now > level + 1) faults.push(`h${now} after h${level}: ${heading.textContent}`);
    level = now;
  }
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const mixed = (layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !shown(element) || element.closest("noscript, script, option, [disabled]")) continue;
    const layers = [];
    for (let above = element; above; above = above.parentElement) layers.unshift(getComputedStyle(above).backgroundColor);
    const style = getComputedStyle(element);
    const [ink, paper] = [mixed([...layers, element instanceof SVGElement ? style.fill : style.color]), mixed(layers)].map(light);
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5) faults.push(`${name(element)} “${node.data.trim().slice(0, 20)}” has a contrast of ${contrast.toFixed(2)}`);
  }
  return [...new Set(faults)];
}
