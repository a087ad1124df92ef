package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity/svidfile"
)

func svidCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "svid",
		Short: "Get X.509-SVIDs from a SPIFFE Workload API, for programs that read files",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		svidSub("fetch", "Write the SVID, its key and the bundle once", func(ctx context.Context, c svidfile.Config, cmd *cobra.Command) error {
			ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
			defer cancel()
			svid, err := svidfile.Fetch(ctx, c)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s, valid until %s, written to %s\n", svid.ID,
				svid.Certificates[0].NotAfter.Format(time.RFC3339), c.Dir)
			return err
		}),
		svidSub("watch", "Keep the files fresh until Ctrl-C", func(ctx context.Context, c svidfile.Config, _ *cobra.Command) error {
			err := svidfile.Watch(ctx, c)
			if ctx.Err() != nil {
				return nil //nolint:nilerr // Ctrl-C is how watching ends
			}
			return err
		}),
	)
	return cmd
}

func svidSub(name, short string, run func(context.Context, svidfile.Config, *cobra.Command) error) *cobra.Command {
	var c svidfile.Config
	var socket, id string
	cmd := &cobra.Command{
		Use:   name + " --write DIR",
		Short: short,
		Long: short + `. The folder then holds svid.pem, svid_key.pem and bundle.pem, which always fit together.

The identity is that of this very process: the entry's selectors must match the sallyport binary.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.Dir == "" {
				return usage("name the folder for the files with --write DIR", "--write is missing")
			}
			c.Addr = socket
			if c.Addr == "" {
				c.Addr = "unix://" + defaultWorkloadSocket()
			}
			if id != "" {
				parsed, err := spiffeid.FromString(id)
				if err != nil {
					return usage("a SPIFFE ID looks like spiffe://example.org/rag-app", "--id: %w", err)
				}
				c.ID = parsed
			}
			c.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			err := run(cmd.Context(), c, cmd)
			switch {
			case err == nil:
				return nil
			case status.Code(err) == codes.PermissionDenied:
				return failed("a Workload document must name selectors that fit this process", "get SVID: %w", err)
			case status.Code(err) == codes.Unavailable || errors.Is(err, context.DeadlineExceeded):
				return failed("is `sallyport up` running or, on other machines, `sallyport agent`, and does it reach its control plane? --socket or $SPIFFE_ENDPOINT_SOCKET names its socket", "get SVID from %s: %w", c.Addr, err)
			case id != "" && strings.Contains(err.Error(), "no such identity"):
				return failed("leave --id out to get what this process may have, or let the Workload with this ID select it", "get SVID: %w", err)
			}
			return fmt.Errorf("get SVID: %w", err)
		},
	}
	cmd.Flags().StringVar(&c.Dir, "write", "", "`DIR` for svid.pem, svid_key.pem and bundle.pem (needed)")
	cmd.Flags().StringVar(&socket, "socket", os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "`ADDRESS` of the Workload API, as in unix:///run/sallyport/workload.sock")
	cmd.Flags().StringVar(&id, "id", "", "SPIFFE `ID` of the identity, if this process may have several")
	return cmd
}
