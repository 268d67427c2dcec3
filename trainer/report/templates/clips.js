// Clips of the page play in step: the first one leads.
const clips = [...document.querySelectorAll("video")];
const [lead, ...others] = clips;
const follow = (always) => {
  for (const clip of others) {
    if (always || Math.abs(clip.currentTime - lead.currentTime) > 0.1) clip.currentTime = lead.currentTime;
    if (lead.paused !== clip.paused) lead.paused ? clip.pause() : clip.play().catch(() => {});
  }
};
for (const event of ["play", "pause", "seeked"]) lead.addEventListener(event, () => follow(true));
lead.addEventListener("timeupdate", () => follow(false));
for (const clip of others) clip.addEventListener("click", () => (lead.paused ? lead.play() : lead.pause()));
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) lead.play().catch(() => {});
