package v1alpha1

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"sallyport.dev/segment"
)

const selectorHint = "selectors are unix:uid:NUMBER, unix:gid:NUMBER, unix:supplementary_gid:NUMBER, unix:user:NAME, unix:group:NAME, " +
	"unix:supplementary_group:NAME, unix:path:/ABSOLUTE/PATH, unix:sha256:HEX, systemd:unit:NAME.service, container:id:HEX and k8s:pod-uid:UUID"

func (a *assembler) selectors(d *Document, written []string) []segment.Selector {
	var selectors []segment.Selector
	for i, s := range written {
		selector, why, hint := parseSelector(s)
		if why != "" {
			a.report(d, "bad-selector", fmt.Sprintf("spec.selectors[%d]", i), fmt.Sprintf("is %q: %s", s, why), hint)
			continue
		}
		selectors = append(selectors, selector)
	}
	slices.SortFunc(selectors, func(a, b segment.Selector) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Value, b.Value))
	})
	return slices.Compact(selectors)
}

// parseSelector reads a selector as identity/attest writes it: those of SPIRE's unix workload attestor, and what a
// control group says. Or it says why it cannot. A selector that no process could ever have is refused, too.
func parseSelector(s string) (selector segment.Selector, why, hint string) {
	plugin, fact, _ := strings.Cut(s, ":")
	name, value, _ := strings.Cut(fact, ":")
	switch kind := plugin + ":" + name; kind {
	case "unix:uid", "unix:gid", "unix:supplementary_gid":
		if n, err := strconv.ParseUint(value, 10, 32); err != nil || strconv.FormatUint(n, 10) != value {
			why, hint = "it is not a number", "as in "+kind+":1000"
		}
	case "unix:user", "unix:group", "unix:supplementary_group":
		if value == "" || strings.ContainsAny(value, ": ") {
			why, hint = "it is not the name of a "+name[strings.LastIndexByte(name, '_')+1:], "as in "+kind+":rag"
		}
	case "unix:path":
		if !path.IsAbs(value) || path.Clean(value) != value {
			why, hint = "it is not an absolute path without . and .. in it", "as in unix:path:/opt/rag/bin/python"
		}
	case "unix:sha256":
		if !isHex(value) {
			why, hint = "it is not 64 lower-case hexadecimal digits", "sha256sum PROGRAM prints them"
		}
	case "systemd:unit":
		why, hint = badUnit(value)
	case "container:id":
		if !isHex(value) {
			why, hint = "it is not 64 lower-case hexadecimal digits", "docker inspect --format '{{.Id}}' NAME prints them"
		}
	case "k8s:pod-uid":
		if !uuid.MatchString(value) {
			why, hint = "it is not a UUID in lower case", "kubectl get pod NAME -o jsonpath={.metadata.uid} prints it"
		}
	default:
		why, hint = "there is no such type of selector", selectorHint
	}
	if why != "" {
		return segment.Selector{}, why, hint
	}
	return segment.Selector{Type: plugin, Value: fact}, "", ""
}

var (
	uuid = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	// unit is a unit's name and its suffix (systemd.unit(5)).
	unit = regexp.MustCompile(`^([A-Za-z0-9:_.\\-][A-Za-z0-9:_.\\@-]*)\.([a-z0-9]+)$`)
)

// badUnit says why no process could be in a unit.
func badUnit(name string) (why, hint string) {
	if !strings.Contains(name, ".") && unit.MatchString(name+".service") {
		return "systemd:unit needs the unit's suffix", "as in systemd:unit:" + name + ".service"
	}
	parts := unit.FindStringSubmatch(name)
	if parts == nil || len(name) > 255 {
		return "it is not the name of a unit", "as in systemd:unit:rag.service"
	}
	switch parts[2] {
	case "service", "scope", "socket", "mount", "swap":
	case "slice", "target", "timer", "path", "device", "automount":
		return "no process is in a " + parts[2] + " itself", "name the unit that it leads to, as in systemd:unit:rag.service"
	default:
		return "systemd:unit needs the unit's suffix", "as in systemd:unit:" + name + ".service"
	}
	if strings.IndexByte(parts[1], '@') == len(parts[1])-1 {
		return "it is a template, which has no processes", "name an instance, as in systemd:unit:" + parts[1] + "1." + parts[2]
	}
	return "", ""
}

func isHex(s string) bool {
	sum, err := hex.DecodeString(s)
	return err == nil && len(sum) == 32 && strings.ToLower(s) == s
}
