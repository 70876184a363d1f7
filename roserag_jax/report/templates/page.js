"use strict";
// Fills the page from its data.
(async () => {
  drawCharts(await read("data-charts"));
  const lists = await read("data-lists");
  if (byId("pairs")) questionList(lists.questions);
  if (byId("evaluation")) differencesTable(lists.differences);
  document.body.dataset.ready = "true";
})();
